"""What every adapted layer is: the module it was, its class swapped for one that knows its adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.adapter import Adapter, Adapters


class LoRALayer(nn.Module):
    """Base of the swapped classes: each kind of layer derives from it and from the class of torch that it adapts."""

    lora: Adapters
    original_class: ClassVar[type[nn.Module]]
    adapter_class: ClassVar[type[Adapter]]
    transposed: ClassVar[bool] = False  # whether the weight is kept as (in_features, out_features)

    @classmethod
    def features(cls, weight: Tensor) -> tuple[int, int]:
        """``(in_features, out_features)`` of the paper's W0, which ``weight`` holds in this kind's own shape."""
        first, rest = len(weight), math.prod(weight.shape[1:])
        return (first, rest) if cls.transposed else (rest, first)

    @classmethod
    def as_weight(cls, delta: Tensor, weight: Tensor) -> Tensor:
        """``delta``, of shape ``(out_features, in_features)``, in the shape of ``weight``."""
        return (delta.t() if cls.transposed else delta).reshape(weight.shape)

    @classmethod
    def factors(cls, adapter: Adapter, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is delta, its rows the first dimension of ``weight``, at least in fp32."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, B = (matrix.detach().to(weight.device, dtype) for matrix in (adapter.A, adapter.B))
        B = B * adapter.scale
        return (A.t(), B.t()) if cls.transposed else (B, A)

    @staticmethod
    def adapter_arguments(module: nn.Module) -> dict[str, Any]:
        """What this kind's adapters take beyond what all take."""
        return {}

    def settle(self) -> bool:
        """Bring a weight that was just merged into the form in which the plain layer keeps it; whether it changed."""
        return False


class WeightAdapter(Adapter):
    """Adds ``scale * B A`` to the weight itself, for layers whose forward is not ours."""

    def forward(self, weight: Tensor, kind: type[LoRALayer]) -> Tensor:
        """The sum, of the shape and dtype of ``weight``; A and B get their gradients through it."""
        A: Tensor = self.A
        if self.padding_idx is not None:
            A = A * (torch.arange(A.shape[1], device=A.device) != self.padding_idx)
        delta = (self.scale * self.B) @ A  # (out_features, in_features)
        return (weight + kind.as_weight(delta, weight)).to(weight.dtype)


class OnWeight(LoRALayer):
    """For classes whose own forward reads ``self.weight``: it finds ``W0 + scale * B A`` there while it runs."""

    adapter_class = WeightAdapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, on the sum."""
        weight = self._parameters["weight"]
        assert weight is not None
        total: Tensor = weight
        for adapter in self.lora.active():
            total = adapter(total, type(self))
        self._parameters["weight"] = total  # type: ignore[assignment]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters["weight"] = weight


def attach(module: nn.Module, cls: type[LoRALayer], adapters: Adapters) -> None:
    """Turn ``module`` into an adapted layer; the object, its parameters, keys and hooks stay."""
    adapters.train(module.training)
    module.__class__ = cls
    module.add_module("lora", adapters)


def detach(layer: LoRALayer) -> Adapters:
    """Give ``layer`` its class back and return the adapters that it had."""
    adapters = layer.lora
    del layer.lora
    layer.__class__ = layer.original_class  # type: ignore[assignment]
    return adapters


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Every adapted layer of ``model`` under its first clean name: what is adapted is asked here and nowhere else."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield names.clean(name), module


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` has live adapters."""
    return any(True for _ in adapted_layers(model))


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight that a layer of a known kind has."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
