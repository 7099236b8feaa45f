"""Triton kernels for products with a dropped input, its mask drawn anew by each: nothing of the input's size for it.

Dropout by the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), Philox4x32
with seven rounds, which by their table 2 is the fewest that pass BigCrush. Eight elements take one draw, 16 bits each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.gated_kernels import add_parts, padded, panel_of


@triton.jit
def _keeps(seed, rows, first, width, threshold, BM: tl.constexpr, BN: tl.constexpr):
    counter = rows[:, None] * ((width + 7) // 8) + (first // 8 + tl.arange(0, BN // 8))[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    one, two, three, four = tl.philox(seed, low, high, low * 0, low * 0, 7)
    words = tl.join(tl.join(one, two), tl.join(three, four))  # (BM, BN / 8, 2, 2)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BM, BN)) >= threshold


@triton.jit
def _dropped_product(
    x, A, hidden, seed_at, n, r, threshold, factor,
    WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, R)
    here, ranked = rows[:, None] < n, ranks < r
    seed = tl.load(seed_at)
    total = tl.zeros((BM, R), tl.float32)
    for first in range(0, WIDTH, BK):
        columns = first + tl.arange(0, BK)
        inside = columns[None, :] < WIDTH
        tile = tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=here & inside, other=0.0)
        tile = tl.where(_keeps(seed, rows, first, WIDTH, threshold, BM, BK), tile, 0.0)
        a = tl.load(A + ranks[:, None] * WIDTH + columns[None, :], mask=ranked[:, None] & inside, other=0.0)
        total = tl.dot(tile, tl.trans(a), total)
    at = rows[:, None] * r + ranks[None, :]
    tl.store(hidden + at, (total * factor).to(hidden.dtype.element_ty), mask=here & ranked[None, :])


@triton.jit
def _dropped_gradients(
    x, back, A, dx, dA_parts, seed_at, n, width, r, threshold, factor,
    PANEL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    panel, block = tl.program_id(0), tl.program_id(1)
    first = block * BN
    columns = first + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside, ranked = columns[None, :] < width, ranks < r
    seed = tl.load(seed_at)
    a = tl.load(A + ranks[:, None] * width + columns[None, :], mask=ranked[:, None] & inside, other=0.0)
    dA = tl.zeros((R, BN), tl.float32)
    for start in range(0, PANEL, BM):
        rows = (panel * PANEL + start + tl.arange(0, BM)).to(tl.int64)
        here = rows[:, None] < n
        at = rows[:, None] * width + columns[None, :]
        keeps = _keeps(seed, rows, first, width, threshold, BM, BN)
        g = tl.load(back + rows[:, None] * r + ranks[None, :], mask=here & ranked[None, :], other=0.0)
        low = tl.where(keeps, tl.dot(g, a) * factor, 0.0)
        tl.store(dx + at, low.to(dx.dtype.element_ty), mask=here & inside)
        tile = tl.where(keeps, tl.load(x + at, mask=here & inside, other=0.0), 0.0)
        dA = tl.dot(tl.trans(g), tile, dA)
    at = (panel.to(tl.int64) * r + ranks[:, None]) * width + columns[None, :]
    tl.store(dA_parts + at, dA * factor, mask=ranked[:, None] & inside)


def chance(p: float) -> tuple[int, float]:
    """Below which 16 random bits an element is dropped, and the factor on the others that keeps the mean."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


def dropped_product(x: Tensor, down: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dropout(x) @ down.T``.

    One H200, 8192 x 4096, r = 16: 32 us, and 20 us without dropout.

    Args:
        x: ``(n, in_features)``, contiguous.
        down: A as it is computed with, ``(r, in_features)``.
        seed: of the mask, one number on the device.
        p: how much is dropped, rounded to 1 / 65536.
    """
    (n, width), r = x.shape, len(down)
    hidden = x.new_empty(n, r)
    _dropped_product[(triton.cdiv(n, 32),)](
        x, down, hidden, seed, n, r, *chance(p), width, 32, 128, padded(r), num_warps=4, num_stages=3
    )
    return hidden


def dropped_gradients(
    x: Tensor, back: Tensor, down: Tensor, seed: Tensor, p: float, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``mask * (back @ down)`` and ``scale * back.T @ dropout(x)`` in ``dtype``, by the mask of the same ``seed``.

    One H200, 8192 x 4096, r = 16: 71 us, and 48 us for both products without dropout.
    """
    (n, width), r = x.shape, len(down)
    blocks = triton.cdiv(width, 128)
    panel = panel_of(n, blocks, 32)
    dx, parts = torch.empty_like(x), torch.empty(triton.cdiv(n, panel), r, width, device=x.device)
    _dropped_gradients[(len(parts), blocks)](
        x, back, down, dx, parts, seed, n, width, r, *chance(p), panel, 32, 128, padded(r), num_warps=2, num_stages=3
    )
    return dx, add_parts(parts, scale, dtype)


def mask(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """What dropout multiplies ``x`` by: zero, or one over the share that is kept."""
    ones = x.new_ones(len(x), 1), x.new_ones(1, x.shape[1])
    kept, _ = dropped_gradients(x.detach(), *ones, seed, p, 1.0, torch.float32)
    return (kept != 0).to(x.dtype) * chance(p)[1]
