"""What every adapted layer is: the module it was, its class swapped for one that knows its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.layers.adapter import Adapter, Adapters
from lightning_lora.layers.weight_view import WeightPart


class LoRALayer(nn.Module):
    """Base of the swapped classes: each kind of layer derives from it and from the class of torch that it adapts."""

    lora: Adapters
    lora_original_class: ClassVar[type[nn.Module]]
    lora_adapter_class: ClassVar[type[Adapter]]

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """The matrices of a ``module`` of this kind that naming it means."""
        return [WeightPart()]

    @staticmethod
    def lora_arguments(module: nn.Module) -> dict[str, Any]:
        """What this kind's adapters take beyond what all take."""
        return {}

    def lora_set_parameter(self, key: str, value: Tensor) -> None:
        """Put ``value`` where the layer's code finds its parameter ``key``."""
        self._parameters[key] = value  # type: ignore[assignment]
        if key in self.__dict__:  # where FSDP1 puts it too while a unit is gathered
            self.__dict__[key] = value

    def lora_after_merge(self) -> bool:
        """Bring a weight that was just merged into the form in which the plain layer keeps it; whether it changed."""
        return False


def set_adapters(module: nn.Module, cls: type[LoRALayer], adapters: Adapters) -> None:
    """Turn ``module`` into an adapted layer; the object, its parameters, keys and hooks stay."""
    adapters.train(module.training)
    module._modules.pop("lora", None)
    module.add_module("lora", adapters)
    module.__class__ = cls


def pop_adapters(layer: LoRALayer) -> Adapters:
    """Give ``layer`` its class back and return the adapters that it had."""
    adapters = layer.lora
    del layer.lora
    layer.__class__ = _plain_class(type(layer))  # type: ignore[assignment]
    return adapters


def _plain_class(cls: type[LoRALayer]) -> type[nn.Module]:
    """The class without adapters; where ``fully_shard`` put its own on top, the one that it would have made."""
    if "lora_original_class" in vars(cls):
        return cls.lora_original_class
    unit, *_ = cls.__bases__  # FSDPModule
    original = cls.lora_original_class
    return type(f"FSDP{original.__name__}", (unit, original), {"__deepcopy__": cls.__deepcopy__})  # type: ignore[attr-defined]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Every adapted layer of ``model`` under its first clean name: what is adapted is asked here and nowhere else."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield names.clean(name), module


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """While it lasts no adapter of ``model`` acts."""
    layers = [layer for _, layer in adapted_layers(model)]
    flags = [layer.lora.enabled for layer in layers]
    for layer in layers:
        layer.lora.enabled = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer.lora.enabled = flag


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` has live adapters."""
    return any(True for _ in adapted_layers(model))


def parameter_of(module: nn.Module, key: str = "weight") -> nn.Parameter:
    """The parameter ``key`` itself, where reading the attribute may give its sum with delta."""
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter
