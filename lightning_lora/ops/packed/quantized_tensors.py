"""Weights of torchao and optimum-quanto: tensors that hold codes and scales, and look like a matrix of floating point.

The layer stays an ``nn.Linear``; its library computes ``F.linear`` on the codes. Not every format has a gradient of the
input: where the input is quantized too, autograd sees a rounding, and the gradient is absent without an error. So
forward is the library's, and backward multiplies by the dequantized matrix. It is made in backward and kept nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.foreign import TENSOR_QUANTIZERS, is_from
from lightning_lora.ops.dispatch import without_autocast
from lightning_lora.torch_internals import in_functorch_transform


def is_quantized_tensor(tensor: object) -> bool:
    """Whether ``tensor`` is quantized by torchao or optimum-quanto: its memory holds codes, not its values."""
    return is_from(type(tensor), *TENSOR_QUANTIZERS)


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that ``tensor`` is stored in: codes and scales, or itself where it is not quantized."""
    if not is_quantized_tensor(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [plain for name in names for plain in stored_tensors(getattr(tensor, name))]


@torch.no_grad()
def dequantized_tensor(weight: Tensor) -> Tensor:
    """The matrix by which ``F.linear`` with the quantized ``weight`` multiplies, in its dtype and in new memory.

    Where the library scales the input before it multiplies, the matrix includes these factors. It does not include
    the rounding of an input that is quantized for each batch.
    """
    inner = getattr(weight, "original_weight_tensor", None)  # the wrapper quantizes the input
    if inner is not None and not isinstance(getattr(weight, "scale", None), Tensor):
        return dequantized_tensor(inner).to(weight.dtype)
    method = getattr(weight, "get_original_weight", None) or weight.dequantize  # of an NF4Tensor, and of others
    try:
        matrix: Tensor = method()
    except (NotImplementedError, AttributeError):
        return _product_with_identity(weight)
    factors = getattr(weight, "act_pre_scale", None)
    matrix = matrix if factors is None else matrix * factors
    return matrix.detach().to(weight.dtype)


def _product_with_identity(weight: Tensor) -> Tensor:
    """The matrix of a packed format that only a product unpacks."""
    identity = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return F.linear(identity, weight).t().contiguous()


def loses_gradient(weight: Tensor) -> bool:
    """Whether ``F.linear`` of the library alone gives its input no gradient, tried with one row."""
    with torch.enable_grad():
        x = torch.ones(1, weight.shape[-1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        try:
            return torch.autograd.grad(F.linear(x, weight.detach()).sum(), x, allow_unused=True)[0] is None
        except (RuntimeError, NotImplementedError):  # the output requires no gradient, or an operation has none
            return True


class QuantizedLinear(torch.autograd.Function):
    """``W0 x + b`` as the library of ``weight`` computes it, with the gradient of the dequantized W0.

    Saved for backward is nothing but a reference to the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients of the input and of the bias; the weight is frozen."""
        needs_dx, needs_db, _ = ctx.needs_input_grad
        dx = dy @ dequantized_tensor(ctx.weight).to(dy.dtype) if needs_dx else None
        return dx, dy.flatten(0, -2).sum(0) if needs_db else None, None


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + b`` for a quantized ``weight``, with a gradient of ``x`` whatever the format.

    Args:
        x: ``(..., in_features)``.
        weight: quantized by torchao or optimum-quanto, ``(out_features, in_features)``.
        bias: ``(out_features,)``.
    """
    needs_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not needs_gradient or weight.requires_grad or in_functorch_transform():
        return F.linear(x, weight, bias)
    y: Tensor = QuantizedLinear.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return y
