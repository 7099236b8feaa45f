"""LoRA on the weight itself, where a layer's own code reads it: ``W0 + scale * B A`` stands there while that runs.

What is built has the size of the weight, and so has its gradient. It is for layers whose forward we do not write, and
for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import fsdp1_units, is_split
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of

_ONE_AT_A_TIME = RLock()  # another thread would take the sums for the weights
PRECISE_DTYPES = (torch.float32, torch.float64)


class WeightAdapter(Adapter):
    """Adds ``scale * B A`` to the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, of the shape and dtype of ``weight``; A and B get their gradients through it."""
        return self.add_to_weight(weight)


class MergedForward(LoRALayer):
    """For classes whose own forward reads their parameters: it finds the sums there while it runs."""

    lora_adapter_class = WeightAdapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, on the sums."""
        with with_merged_weights(self):
            return super().forward(*args, **kwargs)


@contextmanager
def with_merged_weights(module: nn.Module) -> Iterator[None]:
    """While it lasts, adapted layers in ``module`` have their sums in place of their weights, and no adapters."""
    with nullcontext() if torch.compiler.is_compiling() else _ONE_AT_A_TIME:
        layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer) and layer.lora.active_pairs()]
        originals = [(layer, key, parameter_of(layer, key)) for layer in layers for key in layer.lora.by_weight()]
        try:
            for layer, key, _ in originals:
                layer.lora_set_parameter(key, merged_weight(layer, key))
            for layer in layers:
                layer.lora.enabled = False
            yield
        finally:
            for layer, key, weight in originals:
                layer.lora_set_parameter(key, weight)
            for layer in layers:
                layer.lora.enabled = True


def merged_weight(layer: LoRALayer, key: str) -> Tensor:
    """``W0 + scale * B A`` of the parameter ``key`` of ``layer``."""
    total: Tensor = parameter_of(layer, key)
    for adapter in layer.lora.by_weight()[key]:
        total = adapter.add_to_weight(total)
    return total


def has_active_adapters(module: nn.Module) -> bool:
    """Whether any adapter in ``module`` acts now."""
    return any(isinstance(layer, LoRALayer) and layer.lora.active_pairs() for layer in module.modules())


def can_use_merged_weights(module: nn.Module, x: Tensor) -> bool:
    """Whether sums serve for ``module`` now: nothing asks for gradients, no adapter drops, rounding loses no delta.

    Torch's own code then runs as it will after a merge, its fast paths included; nested tensors have no other. Where
    layers inside are gathered one by one, by ZeRO 3 or as FSDP1 units, their weights are not there to be summed.
    """
    if torch.is_grad_enabled():
        return False
    adapters = [a for layer in module.modules() if isinstance(layer, LoRALayer) for a in layer.lora.active_pairs()]
    if any(is_split(adapter.A) for adapter in adapters) or fsdp1_units(module):
        return False
    drops = any(adapter.training and adapter.dropout for adapter in adapters)
    return x.is_nested or (x.dtype in PRECISE_DTYPES and not drops and not torch.is_autocast_enabled(x.device.type))
