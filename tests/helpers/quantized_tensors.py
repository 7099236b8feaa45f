"""Weights that are quantized tensors: a toy one that every machine has, and torchao's, with the matrices they mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

KEEPING = {"aten::detach", "aten::clone", "aten::alias", "aten::_to_copy", "aten::contiguous"}


class ToyBase(Tensor):
    """A class that looks as if it were of the library."""

    __module__ = "torchao.toy"


class DynamicInt8(ToyBase):
    """8-bit codes with a scale for each row; the input is rounded too, so that autograd gives it no gradient.

    It does what torchao's tensors do, and raises as they do for what they do not know.
    """

    codes: Tensor
    scale: Tensor

    def __new__(cls, codes: Tensor, scale: Tensor) -> DynamicInt8:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self) -> str:
        return f"DynamicInt8({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, size, stride):
        return cls(tensors["codes"], tensors["scale"])

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            scale = x.detach().abs().amax(-1, keepdim=True) / 127
            rounded = (x.detach() / scale).round() * scale
            y = rounded @ weight.dequantize().t()
            return y + bias[0] if bias and bias[0] is not None else y
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in KEEPING:
            return cls(func(args[0].codes), func(args[0].scale, **(kwargs or {})))
        if name == "aten::copy_" and isinstance(args[1], DynamicInt8):
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(f"DynamicInt8 does not implement {func}")


def _toy(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return DynamicInt8((weight / scale).round().to(torch.int8), scale)


def _torchao() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        from torchao import quantization
    return quantization


def _by_config(name: str, **kwargs: Any) -> Callable[[nn.Module], None]:
    def quantize(layer: nn.Module) -> None:
        library = _torchao()
        config = getattr(library, name)
        newest = {"version": 2} if "version" in config.__dataclass_fields__ else {}
        library.quantize_(layer, config(**newest, **kwargs))

    return quantize


def _nf4(layer: nn.Module) -> None:
    library = _torchao()
    to_nf4 = getattr(library, "to_nf4", None) or pytest.importorskip("torchao.dtypes").to_nf4
    blocks = min(256, layer.weight.numel() // 64)  # of scales; a copy of a tensor is made with 256
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, blocks), requires_grad=False)


def _int4(layer: nn.Module) -> None:
    _torchao()
    workflow = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
    _torchao().quantize_(layer, workflow.PrototypeInt4WeightOnlyConfig(group_size=32))


# What each does to one linear layer; torchao's are skipped where it is not installed.
FORMATS: dict[str, Callable[[nn.Module], None]] = {
    "toy": lambda layer: setattr(layer, "weight", nn.Parameter(_toy(layer.weight.detach()), requires_grad=False)),
    "int8": _by_config("Int8WeightOnlyConfig"),
    "int8-dynamic": _by_config("Int8DynamicActivationInt8WeightConfig"),
    "float8": _by_config("Float8WeightOnlyConfig"),
    "intx-dynamic": _by_config("Int8DynamicActivationIntxWeightConfig"),
    "int4-cpu": _int4,
    "nf4": _nf4,
}
QUANTIZES_INPUT = {"toy", "int8-dynamic", "intx-dynamic"}


def quantize(model: nn.Module, kind: str, layers: tuple[str, ...] = ()) -> None:
    """Quantize the linear layers of ``model``, or those of these names, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (name in layers or not layers):
            FORMATS[kind](module)


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix that the quantized weight of ``layer`` means, in fp64: the library's product with an identity."""
    weight = layer._parameters["weight"]
    with torch.no_grad():
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype), weight).t().double()
