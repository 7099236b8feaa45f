"""Triton kernel for the gradient of an input through dropout and A; imported only where Triton can be used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.gated_kernels import padded_rank

BM, BN = 32, 256  # the fastest of seven tiles at r = 16


@triton.jit
def _undropped_product(
    d_hidden, A, mask, dx, n, width, r, factor, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns, ranks = tl.program_id(1) * BN + tl.arange(0, BN)[None, :], tl.arange(0, R)
    inside, ranked = (rows < n) & (columns < width), ranks < r
    g = tl.load(d_hidden + rows * r + ranks[None, :], mask=(rows < n) & ranked[None, :], other=0.0)
    a = tl.load(A + ranks[:, None] * width + columns, mask=ranked[:, None] & (columns < width), other=0.0)
    kept = tl.load(mask + rows * width + columns, mask=inside, other=0) != 0
    value = tl.where(kept, tl.dot(g, a) * factor, 0.0)
    tl.store(dx + rows * width + columns, value.to(dx.dtype.element_ty), mask=inside)


def undropped_product(d_hidden: Tensor, A: Tensor, mask: Tensor, factor: float) -> Tensor:
    """``factor * d_hidden @ A`` where ``mask`` is true, else zero; the product is never written.

    On one H200, 8192 x 8192, r = 16: 62 us, against 128 us with the product written and read again.

    Args:
        d_hidden: gradient of ``A x``, ``(n, r)``, in a half dtype.
        A: ``(r, in_features)``, in the same dtype.
        mask: of the inputs that were not dropped, bool, ``(n, in_features)``.
        factor: by which dropout multiplies these.
    """
    n, r = d_hidden.shape
    dx = torch.empty(mask.shape, dtype=A.dtype, device=A.device)
    programs = triton.cdiv(n, BM), triton.cdiv(dx.shape[1], BN)
    arguments = d_hidden.contiguous(), A.contiguous(), mask.contiguous(), dx, n, dx.shape[1], r, factor
    _undropped_product[programs](*arguments, BM, BN, padded_rank(r), num_warps=4)
    return dx
