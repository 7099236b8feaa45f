"""``W0 x + b + scale * B A dropout(x)`` as one node of autograd.

The dropout mask is drawn again in backward from the same seed, and never written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import MAX_R, check_unmodified, supports_kernels, without_autocast
from lightning_lora.ops.fused_linear import compute_dtype
from lightning_lora.ops.products import HALF_DTYPES, add_product, as_matrix, base_plus_low_rank, matmul, scaled
from lightning_lora.torch_internals import version_of

# The kernels round p to a multiple of 1 / 65536, which changes probabilities near 0 and near 1 too much.
MIN_P, MAX_P = 2**-12, 0.9


def can_fuse_dropout(x: Tensor, p: float, r: int) -> bool:
    """Whether the kernels with dropout can be used."""
    kernels = x.is_cuda and r <= MAX_R and supports_kernels(x.get_device())
    return kernels and compute_dtype(x) in HALF_DTYPES and x.is_contiguous() and MIN_P <= p <= MAX_P


class FusedDropoutLinear(torch.autograd.Function):
    """``W0 x + b + scale * B A dropout(x)``; 16 random bits per element of ``x`` decide whether it is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; the seed comes from the random stream of the device."""
        from lightning_lora.ops import dropout_kernels

        seed = torch.randint(2**62, (1,), device=x.device)
        cast_A, cast_B = scaled(A, scale, x.dtype), B.to(x.dtype)
        hidden = dropout_kernels.dropped_product(as_matrix(x), cast_A, seed, p)  # (n, r)
        ctx.save_for_backward(x, hidden, cast_B, cast_A, seed, weight)
        ctx.A, ctx.B, ctx.versions, ctx.scale, ctx.p = A, B, (version_of(A), version_of(B)), scale, p
        return base_plus_low_rank(x, weight, bias, hidden, cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """As :class:`FusedLinear`, but A's part of the gradients is masked as the input was."""
        from lightning_lora.ops import dropout_kernels

        x, hidden, cast_B, cast_A, seed, weight = ctx.saved_tensors
        shape, x, dy = x.shape, as_matrix(x), as_matrix(dy)
        needs_dx, _, needs_db, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        db = dy.sum(0) if needs_db else None
        if torch.is_grad_enabled():  # this backward is differentiated again
            mask = dropout_kernels.dropout_mask(x, seed, ctx.p)
            A, B = (check_unmodified(*pair) for pair in zip((ctx.A, ctx.B), ctx.versions, strict=True))
            cast_A, cast_B = scaled(A, ctx.scale, x.dtype), B.to(x.dtype)
            hidden, d_hidden = torch.mm(x * mask, cast_A.t()), torch.mm(dy, cast_B)
            dx, dA = torch.mm(d_hidden, cast_A) * mask, ctx.scale * matmul(d_hidden.t(), x * mask, ctx.A.dtype)
        else:
            d_hidden = torch.mm(dy, cast_B)
            dx, dA = dropout_kernels.dropped_gradients(x, d_hidden, cast_A, seed, ctx.p, ctx.scale, ctx.A.dtype)
        dB = matmul(dy.t(), hidden, ctx.B.dtype) if needs_dB else None
        total = add_product(dx, dy, weight).view(shape) if needs_dx else None
        return total, None, db, dA if needs_dA else None, dB, None, None


def fused_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> Tensor:
    """The output of :class:`FusedDropoutLinear`."""
    y: Tensor = FusedDropoutLinear.apply(x, weight, bias, A, B, scale, p)  # type: ignore[no-untyped-call]
    return y
