"""``W0 x + b + scale * B A x`` as one node of autograd, for plain tensors on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.dispatch import MAX_R, check_unmodified, without_autocast
from lightning_lora.ops.gated_product import Factors, gradient_of_A, input_or_product, large_saved_factors
from lightning_lora.ops.products import add_product, as_matrix, base_plus_low_rank, matmul, scaled
from lightning_lora.torch_internals import (
    in_dispatch_mode,
    in_forward_mode,
    in_functorch_transform,
    in_jit_trace,
    version_of,
)

PLAIN_CLASSES = {Tensor, nn.Parameter, type(None)}
DEVICES = ("cuda",)  # on a CPU the last bits of a product depend on what it accumulates onto


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FusedLinear` can be used: plain tensors of one dtype, computed eagerly on a GPU.

    A compiler fuses and recomputes the plain formula better. ``torch.func``, tracing and subclasses of tensors need the
    plain formula too.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type in DEVICES
        and type(x) is Tensor
        and {type(weight), type(bias), type(A), type(B)} <= PLAIN_CLASSES
        and compute_dtype(x) == compute_dtype(weight)
        and not in_jit_trace()
        and not in_dispatch_mode()
        and B.shape[0] == weight.shape[0]
        and not (weight.requires_grad and torch.is_grad_enabled())
        and x.numel() > 0
        and not in_functorch_transform()
        and not in_forward_mode()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on ``x``: its own, or that of autocast."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class FusedLinear(torch.autograd.Function):
    """``W0 x + b + scale * B A x``: one product accumulates onto the other, so no sum is written and read again.

    Saved for backward are ``x`` (or its two factors, where autograd keeps those anyway), ``A x``, and A and B as they
    were cast: at small sizes the number of kernels limits the speed of a step.
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
        cast_A, cast_B = scaled(A, scale, x.dtype), B.to(x.dtype)
        hidden = torch.mm(as_matrix(x), cast_A.t())  # (n, r)
        needs_dx = ctx.needs_input_grad[0]
        x_or_factors = (x, None) if factors is None else factors
        needed_for_dx = (cast_A, weight) if needs_dx else (None, None)
        ctx.save_for_backward(*x_or_factors, hidden, cast_B, *needed_for_dx)
        ctx.A, ctx.B, ctx.versions, ctx.scale = A, B, (version_of(A), version_of(B)), scale
        ctx.x = None if factors is None else weakref.ref(x)
        return base_plus_low_rank(x, weight, bias, hidden, cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of ``x``, the bias, A and B; those of A and B in their own dtype, summed in fp32 on a GPU."""
        x, gate, hidden, cast_B, cast_A, weight = ctx.saved_tensors
        shape, dy = x.shape, as_matrix(dy)
        needs_dx, _, needs_db, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # this backward is differentiated again
            x, gate = x if gate is None else input_or_product(ctx.x(), x, gate), None
            A, B = (check_unmodified(*pair) for pair in zip((ctx.A, ctx.B), ctx.versions, strict=True))
            cast_A, cast_B = scaled(A, ctx.scale, x.dtype), B.to(x.dtype)
            hidden = torch.mm(as_matrix(x), cast_A.t())
        d_hidden = torch.mm(dy, cast_B)  # (n, r)
        dx = add_product(torch.mm(d_hidden, cast_A), dy, weight).view(shape) if needs_dx else None
        db = dy.sum(0) if needs_db else None
        dA = gradient_of_A(d_hidden, x, gate, ctx.scale, ctx.A.dtype) if needs_dA else None
        dB = matmul(dy.t(), hidden, ctx.B.dtype) if needs_dB else None
        return dx, None, db, dA, dB, None, None


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The output of :class:`FusedLinear`."""
    factors = large_saved_factors(x) if len(A) <= MAX_R else None
    y: Tensor = FusedLinear.apply(x, weight, bias, A, B, scale, factors)  # type: ignore[no-untyped-call]
    return y
