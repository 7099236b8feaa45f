"""The ops of the method: the frozen map, and the low-rank term added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES = (torch.bfloat16, torch.float16)
PLAIN = {Tensor, nn.Parameter, type(None)}
DEVICES = ("cuda",)  # a CPU's products differ in last bits by what they accumulate onto


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + b`` with the bits that torch gives for a weight that trains.

    Of strided input with three or more dimensions ``torch.nn.functional.linear`` makes another product when the weight
    asks for no gradient: one for each batch, where it makes a single one of a copy. A's product needs that copy anyway.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.
    """
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    y = F.linear(x.contiguous(), weight)
    return y if bias is None else y + bias.to(y.dtype)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale * B A x`` (Hu et al. 2021, equation 3).

    A and B are fp32 whatever the model's dtype; they are cast to the activations' dtype, never the other way round:
    casting activations up costs more time and memory than the whole backbone's weight gradients.

    Args:
        y: the frozen layer's output, ``(..., out_features)``.
        x: its input, ``(..., in_features)``.
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        scale: ``alpha / r``.

    Example:
        >>> import torch
        >>> A, B, x = torch.ones(1, 2), torch.ones(3, 1), torch.ones(2)
        >>> add_low_rank(torch.zeros(3), x, A, B, scale=0.5)
        tensor([1., 1., 1.])
    """
    hidden = F.linear(x, A.to(x.dtype))  # (..., r)
    B = B if scale == 1 else scale * B  # at small sizes a step is bound by the number of kernels
    return y + F.linear(hidden, B.to(x.dtype)).to(y.dtype)


def in_one(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FrozenWithLowRank` serves: plain tensors of one dtype, computed eagerly on a GPU.

    A compiler fuses and recomputes the plain formula better; autocast, ``torch.func``, tracing and tensors of classes
    of their own have it too.
    """
    return (
        x.device.type in DEVICES
        and x.dtype == weight.dtype
        and type(x) is Tensor
        and {type(weight), type(bias), type(A), type(B)} <= PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and B.shape[0] == weight.shape[0]
        and not weight.requires_grad
        and x.numel() > 0
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class FrozenWithLowRank(torch.autograd.Function):
    """``W0 x + b + scale * B A x`` in one node: the low-rank term is written first, the frozen product adds onto it.

    So for the term alone nothing of an activation's size is read or written but once, forward and backward. With a
    bias the frozen map comes first: cuBLAS adds a bias by another rounding, and while B is zero the output is the
    base's. Kept for backward are ``x``, which the frozen map's neighbours mostly keep too, ``A x``, and A and B as they
    were cast: at small sizes a step is bound by the number of kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``(n, in_features)``, of the dtype of ``weight``, to ``(n, out_features)``; A and B are cast down to it."""
        down, up = A.to(x.dtype), B.to(x.dtype)
        hidden = F.linear(x, down)  # (n, r)
        if bias is not None:
            y = F.linear(x, weight, bias).addmm_(hidden, up.t(), alpha=scale)
        elif scale == 1:
            y = F.linear(hidden, up).addmm_(x, weight.t())
        else:
            y = x.new_empty(len(x), len(up)).addmm_(hidden, up.t(), beta=0, alpha=scale).addmm_(x, weight.t())
        passes = ctx.needs_input_grad[0]
        ctx.save_for_backward(x, hidden, up, down if passes else None, weight if passes else None)
        ctx.A, ctx.B, ctx.scale = A, B, scale  # which may have been stepped on by then, unlike the casts
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of A and B in their own dtype, summed in fp32 where the device can."""
        x, hidden, up, down, weight = ctx.saved_tensors
        wants_x, _, wants_bias, wants_A, wants_B, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            down, up = ctx.A.to(x.dtype), ctx.B.to(x.dtype)
            hidden = torch.mm(x, down.t())
        back = scaled(torch.mm(gradient, up), ctx.scale)  # (n, r)
        dx = torch.mm(back, down).addmm_(gradient, weight) if wants_x else None
        bias = gradient.sum(0) if wants_bias else None
        dA = product(back.t(), x, ctx.A.dtype) if wants_A else None
        dB = scaled(product(gradient.t(), hidden, ctx.B.dtype), ctx.scale) if wants_B else None
        return dx, None, bias, dA, dB, None


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """``scale * tensor``, by no kernel where the scale is 1, as it is unless the user says otherwise."""
    return tensor if scale == 1 else scale * tensor


def product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """``one @ other`` in ``dtype``: not rounded to the inputs' own on the way, where cuBLAS can do without."""
    if one.is_cuda and dtype == torch.float32 and one.dtype in HALVES and not torch.is_grad_enabled():
        return torch.mm(one, other, out_dtype=dtype)
    return torch.mm(one, other).to(dtype)
