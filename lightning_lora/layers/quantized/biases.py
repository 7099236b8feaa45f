"""The dtype of a trained bias of a 4-bit layer.

bitsandbytes casts a bias at the first call to the dtype in which the layer computes. Where it trains, the states of an
optimizer that were loaded before that call would have another dtype, and a resumed run could not step.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def cast_trained_bias(layer: nn.Module) -> None:
    """Cast the bias of a quantized ``layer``, if it trains, as the first call would, where the dtype is known."""
    bias: Any = layer._parameters.get("bias")
    known = getattr(layer, "compute_type_is_set", False)
    if known and bias is not None and bias.requires_grad and bias.dtype != layer.compute_dtype:
        bias.data = bias.data.to(layer.compute_dtype)
