"""Frozen layers whose quantized weight gives their input no gradient: what is before them would not train, in silence.

LoRA computes this gradient itself, in every linear layer of torch's that is quantized when it adapts the model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.base import LoRALayer
from lightning_lora.methods.base import Method
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor, loses_gradient
from lightning_lora.trainer.imports import MisconfigurationException

WAYS_OUT = {
    True: "Quantize the model in `__init__`, `setup` or `configure_model`: LoRA then computes this gradient itself.",
    False: "Quantize the weights alone, as `Int8WeightOnlyConfig` does, or use LoRACallback, which computes this "
    "gradient itself.",
}


class LostGradients:
    """Raises in the first batch where an input that requires a gradient would get none.

    Args:
        module: of the run.
        method: that it is adapted by.
    """

    def __init__(self, module: nn.Module, method: Method) -> None:
        self.way_out = WAYS_OUT[method.key == "lora"]
        self.handles = [
            layer.register_forward_pre_hook(partial(self._check, names.clean(name)))
            for name, layer in names.each_module_once(module)
            if not isinstance(layer, LoRALayer) and self._loses(layer._parameters.get("weight"))
        ]

    def _loses(self, weight: nn.Parameter | None) -> bool:
        return weight is not None and weight.dim() == 2 and is_quantized_tensor(weight) and loses_gradient(weight)

    def _check(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise MisconfigurationException(
                f"The weight of `{name}` is a {type(layer._parameters['weight']).__name__} that gives the input of "
                f"the layer no gradient, so nothing before it would train. {self.way_out}"
            )

    def close(self) -> None:
        """Remove the hooks."""
        while self.handles:
            self.handles.pop().remove()
