"""``W0 x + b + scale * B A dropout(x)`` as one node of autograd, for large inputs.

The dropout mask is drawn again in backward from the same seed, and never written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import MAX_R, check_unmodified, supports_kernels, without_autocast
from lightning_lora.ops.fused_linear import compute_dtype
from lightning_lora.ops.products import (
    HALF_DTYPES,
    add_product,
    as_matrix,
    base_plus_low_rank,
    differentiable_gradients,
    like,
    matmul,
    scaled,
)
from lightning_lora.torch_internals import apply_of, is_batched, saved_tensors_have_hooks, versions_of

MIN_ELEMENTS = 2**23  # of an input; below this, launching the kernels takes longer than torch's own dropout
# The kernels round p to a multiple of 1 / 65536, which changes probabilities near 0 and near 1 too much.
MIN_P, MAX_P = 2**-12, 0.9


def can_fuse_dropout(x: Tensor, p: float, r: int) -> bool:
    """Whether the kernels with dropout can be used, and are faster."""
    if x.numel() < MIN_ELEMENTS or not x.is_cuda or r > MAX_R or not supports_kernels(x.get_device()):
        return False
    return compute_dtype(x) in HALF_DTYPES and x.is_contiguous() and MIN_P <= p <= MAX_P


class FusedDropoutLinear(torch.autograd.Function):
    """``W0 x + b + scale * B A dropout(x)``; 16 random bits per element of ``x`` decide whether it is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, constants: tuple[Tensor, float, float]
    ) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; ``constants`` are W0, the scale and the probability.

        The seed comes from the random stream of the device.
        """
        from lightning_lora.ops import dropout_kernels

        weight, scale, p = constants
        seed = torch.randint(2**62, (1,), device=x.device)
        cast_A, cast_B = scaled(A, scale, x.dtype), B.to(dtype=x.dtype)
        hidden = dropout_kernels.dropped_product(as_matrix(x), cast_A, seed, p)  # (n, r)
        ctx.save_for_backward(x, None if saved_tensors_have_hooks() else hidden)
        ctx.constants = A, B, weight, versions_of(A, B, weight), cast_A, cast_B, scale, p, seed
        return base_plus_low_rank(x, weight, bias, hidden.view(*x.shape[:-1], -1), cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """As :class:`FusedLinear`, but A's part of the gradients is masked as the input was."""
        from lightning_lora.ops import dropout_kernels

        x, hidden = ctx.saved_tensors
        A, B, weight, versions, cast_A, cast_B, scale, p, seed = ctx.constants
        needs_dx, needs_db, _, needs_dB, _ = ctx.needs_input_grad
        if needs_dx:
            check_unmodified(weight, versions[2])
        rows, dy_rows = as_matrix(x), as_matrix(dy)
        db = dy_rows.sum(0) if needs_db else None
        if torch.is_grad_enabled() or is_batched(dy):
            check_unmodified(A, versions[0])
            check_unmodified(B, versions[1])
            mask = like(dropout_kernels.dropout_mask(rows, seed, p), x)
            base, low, dA, dB = differentiable_gradients(dy, x * mask, weight, A, B, scale)
            return base + low * mask, db, dA, dB, None
        d_hidden = torch.mm(dy_rows, cast_B)
        low, dA = dropout_kernels.dropped_gradients(rows, d_hidden, cast_A, seed, p, scale, A.dtype)
        if needs_dB and hidden is None:
            hidden = dropout_kernels.dropped_product(rows, cast_A, seed, p)
        dx = like(add_product(low, dy_rows, weight), x) if needs_dx else None
        return dx, db, dA, matmul(dy_rows.t(), hidden, B.dtype) if needs_dB else None, None


_apply = apply_of(FusedDropoutLinear)


def fused_dropout_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> Tensor:
    """The output of :class:`FusedDropoutLinear`."""
    y: Tensor = _apply(x, bias, A, B, (weight, scale, p))
    return y
