"""Run the original forward of a layer on the merged weight: ``W0 + scale * B A`` replaces W0 while it runs.

The merged weight and its gradient have the size of the weight. This is for layers whose forward cannot be rewritten,
and for inference.
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

_ONE_AT_A_TIME = RLock()  # another thread would read the merged weights as the original ones
PRECISE_DTYPES = (torch.float32, torch.float64)


class WeightAdapter(Adapter):
    """Adds ``scale * B A`` to the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        """The merged weight, of the shape and dtype of ``weight``; differentiable by A and B."""
        return self.add_to_weight(weight)


class MergedForward(LoRALayer):
    """Mixin for classes whose original forward reads the parameters: while it runs they are the merged weights."""

    lora_adapter_class = WeightAdapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on the merged weights."""
        with with_merged_weights(self):
            return super().forward(*args, **kwargs)


@contextmanager
def with_merged_weights(module: nn.Module) -> Iterator[None]:
    """Context manager in which adapted layers in ``module`` have merged weights, and their adapters are disabled."""
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
    """Whether ``module`` can run on merged weights: no gradients, no dropout, and no delta lost to rounding.

    The original code then runs as it will after a merge, fast paths included; nested tensors are supported only there.
    Where ZeRO 3 or FSDP1 gathers the layers inside one by one, their weights are not available all at once.
    """
    if torch.is_grad_enabled():
        return False
    adapters = [a for layer in module.modules() if isinstance(layer, LoRALayer) for a in layer.lora.active_pairs()]
    if any(is_split(adapter.A) for adapter in adapters) or fsdp1_units(module):
        return False
    drops = any(adapter.training and adapter.dropout for adapter in adapters)
    return x.is_nested or (x.dtype in PRECISE_DTYPES and not drops and not torch.is_autocast_enabled(x.device.type))
