"""The frozen map and the low-rank term as one node of autograd, where tensors are plain and computed on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.dispatch import LARGEST_R, as_it_was, outside_autocast
from lightning_lora.ops.gated_product import Factors, factors_of, gradient_of_A, multiplied
from lightning_lora.ops.products import both_terms, product, rows_of, scaled, sum_of_products
from lightning_lora.torch_internals import (
    in_dispatch_mode,
    in_forward_mode,
    in_functorch_transform,
    in_jit_trace,
    version_of,
)

PLAIN = {Tensor, nn.Parameter, type(None)}
DEVICES = ("cuda",)  # a CPU's products differ in last bits by what they accumulate onto


def in_one(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FrozenWithLowRank` serves: plain tensors of one dtype, computed eagerly on a GPU.

    A compiler fuses and recomputes the plain formula better; ``torch.func``, tracing and tensors of classes of their
    own have it too.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type in DEVICES
        and type(x) is Tensor
        and {type(weight), type(bias), type(A), type(B)} <= PLAIN
        and computed_dtype(x) == computed_dtype(weight)
        and not in_jit_trace()
        and not in_dispatch_mode()
        and B.shape[0] == weight.shape[0]
        and not (weight.requires_grad and torch.is_grad_enabled())
        and x.numel() > 0
        and not in_functorch_transform()
        and not in_forward_mode()
    )


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map of ``x`` is computed: its own, or that of autocast."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class FrozenWithLowRank(torch.autograd.Function):
    """``W0 x + b + scale * B A x`` in one node: the low-rank term is written first, the frozen product adds onto it.

    So for the term alone nothing of an activation's size is read or written but once, forward and backward. Kept for
    backward are ``x``, or the two tensors that it was multiplied from where those are kept anyway, ``A x``, and A and B
    as they were cast: at small sizes a step is bound by the number of kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        factors: Factors = None,
    ) -> Tensor:
        """``(..., in_features)``, of the dtype of ``weight``, to ``(..., out_features)``; A and B are cast to it."""
        down, up = scaled(A, scale, x.dtype), B.to(x.dtype)
        hidden = torch.mm(rows_of(x), down.t())  # (n, r)
        passes = ctx.needs_input_grad[0]
        x_or_factors = (x, None) if factors is None else factors
        ctx.save_for_backward(*x_or_factors, hidden, up, down if passes else None, weight if passes else None)
        ctx.A, ctx.B, ctx.versions, ctx.scale = A, B, (version_of(A), version_of(B)), scale
        ctx.x = None if factors is None else weakref.ref(x)
        return both_terms(x, weight, bias, hidden, up)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of A and B in their own dtype, summed in fp32 where the device can."""
        x, gate, hidden, up, down, weight = ctx.saved_tensors
        shape, gradient = x.shape, rows_of(gradient)
        wants_x, _, wants_bias, wants_A, wants_B, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            x, gate = x if gate is None else multiplied(ctx.x(), x, gate), None
            A, B = (as_it_was(*pair) for pair in zip((ctx.A, ctx.B), ctx.versions, strict=True))
            down, up = scaled(A, ctx.scale, x.dtype), B.to(x.dtype)
            hidden = torch.mm(rows_of(x), down.t())
        back = torch.mm(gradient, up)  # (n, r)
        dx = sum_of_products(torch.mm(back, down), gradient, weight).view(shape) if wants_x else None
        db = gradient.sum(0) if wants_bias else None
        dA = gradient_of_A(back, x, gate, ctx.scale, ctx.A.dtype) if wants_A else None
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        return dx, None, db, dA, dB, None, None


def frozen_with_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The node's output."""
    factors = factors_of(x) if len(A) <= LARGEST_R else None
    y: Tensor = FrozenWithLowRank.apply(x, weight, bias, A, B, scale, factors)  # type: ignore[no-untyped-call]
    return y
