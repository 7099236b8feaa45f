"""The same node with dropout in front of A, whose mask is drawn again where it is needed and never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import LARGEST_R, as_it_was, outside_autocast, runs_kernels
from lightning_lora.ops.fused_linear import computed_dtype
from lightning_lora.ops.products import HALVES, both_terms, product, rows_of, scaled, sum_of_products
from lightning_lora.torch_internals import version_of

LEAST, MOST = 2**-12, 0.9  # p is rounded to 1 / 65536: near 0 and near 1 that would be no small change


def can_drop(x: Tensor, p: float, r: int) -> bool:
    """Whether the kernels with dropout inside serve."""
    kernels = x.is_cuda and r <= LARGEST_R and runs_kernels(x.get_device())
    return kernels and computed_dtype(x) in HALVES and x.is_contiguous() and LEAST <= p <= MOST


class FrozenWithDropped(torch.autograd.Function):
    """``W0 x + b + scale * B A dropout(x)``; each element of ``x`` is kept by 16 random bits of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; the seed comes from the device's own random stream."""
        from lightning_lora.ops import dropout_kernels

        seed = torch.randint(2**62, (1,), device=x.device)
        down, up = scaled(A, scale, x.dtype), B.to(x.dtype)
        hidden = dropout_kernels.dropped_product(rows_of(x), down, seed, p)  # (n, r)
        ctx.save_for_backward(x, hidden, up, down, seed, weight)
        ctx.A, ctx.B, ctx.versions, ctx.scale, ctx.p = A, B, (version_of(A), version_of(B)), scale, p
        return both_terms(x, weight, bias, hidden, up)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """As the node without dropout; A sees what was kept, and ``x`` gets its gradient there alone."""
        from lightning_lora.ops import dropout_kernels

        x, hidden, up, down, seed, weight = ctx.saved_tensors
        shape, x, gradient = x.shape, rows_of(x), rows_of(gradient)
        wants_x, _, wants_bias, wants_A, wants_B, *_ = ctx.needs_input_grad
        db = gradient.sum(0) if wants_bias else None
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            kept = dropout_kernels.mask(x, seed, ctx.p)
            A, B = (as_it_was(*pair) for pair in zip((ctx.A, ctx.B), ctx.versions, strict=True))
            down, up = scaled(A, ctx.scale, x.dtype), B.to(x.dtype)
            hidden, back = torch.mm(x * kept, down.t()), torch.mm(gradient, up)
            dx, dA = torch.mm(back, down) * kept, ctx.scale * product(back.t(), x * kept, ctx.A.dtype)
        else:
            back = torch.mm(gradient, up)
            dx, dA = dropout_kernels.dropped_gradients(x, back, down, seed, ctx.p, ctx.scale, ctx.A.dtype)
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        total = sum_of_products(dx, gradient, weight).view(shape) if wants_x else None
        return total, None, db, dA if wants_A else None, dB, None, None


def frozen_with_dropped(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> Tensor:
    """The node's output."""
    y: Tensor = FrozenWithDropped.apply(x, weight, bias, A, B, scale, p)  # type: ignore[no-untyped-call]
    return y
