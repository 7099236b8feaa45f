"""Triton kernel for the gradient of A with an input that is a product; imported only where Triton can be used.

Reading and writing activations costs more than the arithmetic, so the product is never written. Sums over rows are
computed as one partial sum per panel of rows and added in a fixed order, so that every kernel is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # a few per multiprocessor of a large GPU


def padded_rank(r: int) -> int:
    """``r`` rounded up to a size that tensor cores accept."""
    return max(16, int(triton.next_power_of_2(r)))


def panel_rows(n: int, blocks: int, rows: int) -> int:
    """Rows per panel, a multiple of ``rows``, so that all panels of ``blocks`` programs run at the same time."""
    return max(rows, int(triton.next_power_of_2(triton.cdiv(n * blocks, PROGRAMS))))


@triton.jit
def _gated_gradient(
    gate, up, d_hidden, dA_partials, n, width, r, scale,
    PANEL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    panel, block = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside = columns[None, :] < width
    dA = tl.zeros((R, BN), tl.float32)
    for start in range(0, PANEL, BM):
        rows = (panel * PANEL + start + tl.arange(0, BM)).to(tl.int64)
        here = rows[:, None] < n
        at = rows[:, None] * width + columns[None, :]
        tile = tl.load(gate + at, mask=here & inside, other=0.0) * tl.load(up + at, mask=here & inside, other=0.0)
        g = tl.load(d_hidden + rows[:, None] * r + ranks[None, :], mask=here & (ranks < r)[None, :], other=0.0)
        dA = tl.dot(tl.trans(g), tile, dA)
    at = (panel.to(tl.int64) * r + ranks[:, None]) * width + columns[None, :]
    tl.store(dA_partials + at, dA * scale, mask=(ranks < r)[:, None] & inside)


def gated_gradient(d_hidden: Tensor, gate: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * d_hidden.T @ (gate * up)``; the product is rounded to its dtype as in forward, and never written.

    On one H200, 8192 x 8192, r = 16: 68 us, against 38 us with a saved product, which takes 128 MiB.

    Args:
        d_hidden: gradient of ``A x``, ``(n, r)``.
        gate: ``(n, in_features)``, contiguous.
        up: ``(n, in_features)``, contiguous.
        scale: factor of the result.
        dtype: of the result ``(r, in_features)``, which is summed in fp32.
    """
    (n, width), r = gate.shape, d_hidden.shape[1]
    BM, BN = 32, 128
    blocks = triton.cdiv(width, BN)
    panel = panel_rows(n, blocks, 2 * BM)
    partials = torch.empty(triton.cdiv(n, panel), r, width, device=gate.device)
    _gated_gradient[(len(partials), blocks)](
        gate, up, d_hidden, partials, n, width, r, scale, panel, BM, BN, padded_rank(r), num_warps=4, num_stages=4
    )
    return partials.sum(0, dtype=dtype)
