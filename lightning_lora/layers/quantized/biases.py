"""The dtype of the bias of a quantized layer.

bitsandbytes casts a bias at the first call to the dtype in which the layer computes. Where it trains, the states of an
optimizer that were loaded before that call would have another dtype, and a resumed run could not step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def bias_in(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The bias of ``layer``, cast in place to ``dtype``, that in which the layer computes."""
    bias = layer._parameters["bias"]
    if bias is not None and bias.dtype != dtype:
        bias.data = bias.data.to(dtype)
    return bias


def cast_trained_bias(layer: Any) -> None:
    """Cast the bias of a quantized ``layer``, if it trains, as the first call would, where the dtype is known."""
    bias = layer._parameters.get("bias")
    if bias is not None and bias.requires_grad and getattr(layer, "compute_type_is_set", False):
        bias_in(layer, layer.compute_dtype)
