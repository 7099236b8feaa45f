"""Run the original forward of a layer on the merged weight: ``W0 + scale * B A`` replaces W0 while it runs.

The merged weight and its gradient have the size of the weight. This is for layers whose forward cannot be rewritten,
and for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import fsdp1_units, is_split
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, disable_adapters, parameter_of
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.ops.linear import Coefficient

LOCK = RLock()  # held while a layer has other weights than its own
Result = TypeVar("Result")
PRECISE_DTYPES = (torch.float32, torch.float64)


class WeightAdapter(Adapter):
    """Adds ``scale * B A`` to the weight."""

    def forward(self, weight: Tensor, coefficient: Coefficient = None) -> Tensor:
        """The merged weight, of the shape and dtype of ``weight``; differentiable by A and B."""
        return self.add_to_weight(weight, coefficient)


class MergedForward(LoRALayer):
    """Mixin for classes whose original forward reads the parameters: while it runs they are the merged weights."""

    lora_adapter_class = WeightAdapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on the merged weights."""
        return call_on_merged_weights(self, super().forward, *args, **kwargs)


def call_on_merged_weights(module: nn.Module, forward: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """``forward(*args, **kwargs)`` while adapted layers in ``module`` have merged weights and no active adapters.

    One thread at a time: another one would read merged weights as the base's.
    """
    # Dynamo knows no locks. With a second context manager here, torch 2.13 on Python 3.11 fails at an assertion.
    if torch.compiler.is_compiling():
        with with_merged_weights(module):
            return forward(*args, **kwargs)
    with LOCK, with_merged_weights(module):
        return forward(*args, **kwargs)


def with_merged_weights(module: nn.Module) -> Restoring:
    """Context manager in which adapted layers in ``module`` have merged weights, and their adapters are disabled."""
    return Restoring(partial(_use_merged_weights, module))


def _use_merged_weights(module: nn.Module, undo: Undo) -> None:
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer) and layer.lora.active_pairs()]
    for layer in layers:
        for summed in () if torch.compiler.is_compiling() else layer.lora.sums.values():
            summed.forget_values()
        for key in layer.lora.by_weight():
            use_weights(layer, {key: merged_weight(layer, key)}, undo)
    disable_adapters(module, undo)


def use_weights(layer: LoRALayer, weights: Mapping[str, Tensor], undo: Undo) -> None:
    """Replace parameters of ``layer`` by ``weights``, until the functions in ``undo`` are called."""
    for key, weight in weights.items():
        undo.append(partial(layer.lora_set_parameter, key, parameter_of(layer, key)))
        layer.lora_set_parameter(key, weight)


def merged_weight(layer: LoRALayer, key: str) -> Tensor:
    """``W0 + scale * B A`` of the parameter ``key`` of ``layer``, with the adapters that act now.

    Raises:
        ValueError: if the samples of the batch use different adapters.
    """
    total: Tensor = parameter_of(layer, key)
    for adapter, coefficient in layer.lora.terms_of_weight():
        if adapter.part.key == key:
            total = adapter.add_to_weight(total, coefficient)
    return total


def chooses_by_sample(layer: LoRALayer) -> bool:
    """Whether the samples of the batch use different adapters of ``layer``."""
    choice = layer.lora.choice_now()
    return choice is not None and not choice.is_uniform


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
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    if any(chooses_by_sample(layer) for layer in layers):
        return False
    adapters = [adapter for layer in layers for adapter in layer.lora.active_pairs()]
    if any(is_split(adapter.A) for adapter in adapters) or fsdp1_units(module):
        return False
    drops = any(adapter.training and adapter.dropout for adapter in adapters)
    return x.is_nested or (x.dtype in PRECISE_DTYPES and not drops and not torch.is_autocast_enabled(x.device.type))
