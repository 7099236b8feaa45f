"""Triton kernels for ``W0 + scale * B A`` and its gradients, of layers of any shapes; imported only where it is usable.

One launch computes all layers. Each program reads from ``tiles`` which tile of which block it computes, and from
``table`` the sizes and addresses of that block. No two programs write the same element, so the kernels are
deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.sums.views import ALIGNMENT

# What the table holds for each block. The results are at offsets from the beginning of one allocation, in UNITs.
FIELDS = tl.constexpr(10)
ROWS, COLUMNS, RANK, INNER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
WEIGHT, LEFT, RIGHT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)  # addresses of W0, B, A
SUM, LEFT_GRADIENT, RIGHT_GRADIENT = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
UNIT = tl.constexpr(ALIGNMENT)

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _logical(stored, columns, inner, PLAIN: tl.constexpr):
    """The columns of A that belong to columns of W0 in the order in which these are stored."""
    logical = stored
    if not PLAIN:
        logical = stored % inner * (columns // inner) + stored // inner
    return logical


@triton.jit
def _sum_tile(
    weight, left, right, total, rows, columns, r, inner, tile, scale,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        columns = columns // 16 * 16  # tells the compiler that it is a multiple of 16
    weight, left, right = (
        _pointer(weight, DTYPE, ALIGNED), _pointer(left, tl.float32, False), _pointer(right, tl.float32, PLAIN)
    )  # fmt: skip
    blocks = tl.cdiv(columns, BN)
    i, j = tile // blocks * BM + tl.arange(0, BM), tile % blocks * BN + tl.arange(0, BN)
    here, inside = (i < rows)[:, None], (j < columns)[None, :]
    at = i[:, None] * columns + j[None, :]
    value = tl.load(weight + at, mask=here & inside, other=0.0).to(tl.float32)
    j = _logical(j, columns, inner, PLAIN)
    delta = tl.zeros((BM, BN), tl.float32)
    for first in range(0, r, BK):
        k = first + tl.arange(0, BK)
        b = tl.load(left + (i[:, None] * r + k[None, :]), mask=here & (k < r)[None, :], other=0.0)
        a = tl.load(right + (k[:, None] * columns + j[None, :]), mask=(k < r)[:, None] & inside, other=0.0)
        delta = tl.dot(b, a, delta, input_precision="ieee")
    value = tl.where(delta == 0, value, value + scale * delta)  # -0.0 + 0.0 would be 0.0
    tl.store(total + at, value.to(total.dtype.element_ty), mask=here & inside)


@triton.jit
def _sums(
    tiles, table, totals, scale,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    tiles += 2 * tl.program_id(0)
    layer, tile = tl.load(tiles), tl.load(tiles + 1)
    table += layer * FIELDS
    rows, columns = tl.load(table + ROWS).to(tl.int32), tl.load(table + COLUMNS).to(tl.int32)
    r, inner = tl.load(table + RANK).to(tl.int32), tl.load(table + INNER).to(tl.int32)
    weight, left, right = tl.load(table + WEIGHT), tl.load(table + LEFT), tl.load(table + RIGHT)
    total = totals + tl.load(table + SUM) * UNIT
    if PLAIN:
        _sum_tile(weight, left, right, total, rows, columns, r, inner, tile, scale, DTYPE, BM, BN, BK, True, True)
    elif (weight % 16 == 0) & (columns % 16 == 0):
        _sum_tile(weight, left, right, total, rows, columns, r, inner, tile, scale, DTYPE, BM, BN, BK, True, False)
    else:
        _sum_tile(weight, left, right, total, rows, columns, r, inner, tile, scale, DTYPE, BM, BN, BK, False, False)


# "tf32x3" computes a product of fp32 as three of TF32 on tensor cores. For 145 MiB of dW and r = 16 an H200 took 272 us
# in place of 488, and the error was 2.6e-7 in place of 1.3e-6. The sums above are faster in fp32 up to r = 16.
@triton.jit
def _left_tile(
    gradient, right, d_left, rows, columns, r, inner, tile, scale,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Rows of ``scale * dW A^T``."""
    if ALIGNED:
        columns = columns // 16 * 16
    gradient, right = _pointer(gradient, DTYPE, ALIGNED), _pointer(right, tl.float32, PLAIN)
    i, k = tile * BM + tl.arange(0, BM), tl.arange(0, R)
    here, ranked = (i < rows)[:, None], k < r
    total = tl.zeros((BM, R), tl.float32)
    for first in range(0, columns, BN):
        j = first + tl.arange(0, BN)
        inside = (j < columns)[None, :]
        g = tl.load(gradient + (i[:, None] * columns + j[None, :]), mask=here & inside, other=0.0)
        at = k[:, None] * columns + _logical(j, columns, inner, PLAIN)[None, :]
        a = tl.load(right + at, mask=ranked[:, None] & inside, other=0.0).to(DTYPE)
        total = tl.dot(g, tl.trans(a), total, input_precision="tf32x3")
    tl.store(d_left + (i[:, None] * r + k[None, :]), total * scale, mask=here & ranked[None, :])


@triton.jit
def _right_tile(
    gradient, left, d_right, rows, columns, r, inner, tile, scale,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Columns of ``scale * B^T dW``."""
    if ALIGNED:
        columns = columns // 16 * 16
    gradient, left = _pointer(gradient, DTYPE, ALIGNED), _pointer(left, tl.float32, False)
    j, k = tile * BN + tl.arange(0, BN), tl.arange(0, R)
    inside, ranked = (j < columns)[None, :], k < r
    total = tl.zeros((R, BN), tl.float32)
    for first in range(0, rows, BM):
        i = first + tl.arange(0, BM)
        here = (i < rows)[:, None]
        g = tl.load(gradient + (i[:, None] * columns + j[None, :]), mask=here & inside, other=0.0)
        b = tl.load(left + (i[:, None] * r + k[None, :]), mask=here & ranked[None, :], other=0.0).to(DTYPE)
        total = tl.dot(tl.trans(b), g, total, input_precision="tf32x3")
    at = k[:, None] * columns + _logical(j, columns, inner, PLAIN)[None, :]
    tl.store(d_right + at, total * scale, mask=ranked[:, None] & inside)


@triton.jit(do_not_specialize=["blocks", "of_lefts"])
def _gradients(
    tiles, table, addresses, results, blocks, of_lefts, scale,
    DTYPE: tl.constexpr, LEFT_M: tl.constexpr, LEFT_N: tl.constexpr, RIGHT_M: tl.constexpr, RIGHT_N: tl.constexpr,
    R: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles += 2 * program
    block, tile = tl.load(tiles), tl.load(tiles + 1)
    table += block * FIELDS
    addresses += block
    rows, columns = tl.load(table + ROWS).to(tl.int32), tl.load(table + COLUMNS).to(tl.int32)
    r, inner = tl.load(table + RANK).to(tl.int32), tl.load(addresses + 3 * blocks).to(tl.int32)
    dW = tl.load(addresses)
    if dW == 0:  # of a layer that was not called, or of rows without a pair
        return
    is_aligned = (dW % 16 == 0) & (columns % 16 == 0)
    if program < of_lefts:
        A, dB = tl.load(addresses + 2 * blocks), results + tl.load(table + LEFT_GRADIENT) * UNIT
        if PLAIN:
            _left_tile(dW, A, dB, rows, columns, r, inner, tile, scale, DTYPE, LEFT_M, LEFT_N, R, True, True)
        elif is_aligned:
            _left_tile(dW, A, dB, rows, columns, r, inner, tile, scale, DTYPE, LEFT_M, LEFT_N, R, True, False)
        else:
            _left_tile(dW, A, dB, rows, columns, r, inner, tile, scale, DTYPE, LEFT_M, LEFT_N, R, False, False)
    else:
        B, dA = tl.load(addresses + blocks), results + tl.load(table + RIGHT_GRADIENT) * UNIT
        if PLAIN:
            _right_tile(dW, B, dA, rows, columns, r, inner, tile, scale, DTYPE, RIGHT_M, RIGHT_N, R, True, True)
        elif is_aligned:
            _right_tile(dW, B, dA, rows, columns, r, inner, tile, scale, DTYPE, RIGHT_M, RIGHT_N, R, True, False)
        else:
            _right_tile(dW, B, dA, rows, columns, r, inner, tile, scale, DTYPE, RIGHT_M, RIGHT_N, R, False, False)


SUM_TILE = 32, 128  # rows, columns
SUM_RANKS = 16  # multiplied at a time
LEFT_ROWS = 64  # of d_left that a program computes


def left_tile(r: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of dW that a program multiplies at a time by A^T, for a padded rank."""
    return LEFT_ROWS, 32 if dtype == torch.float32 else max(32, min(128, 4096 // r))


def right_tile(r: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of dW that a program multiplies at a time by B^T, for a padded rank."""
    return 16 if dtype == torch.float32 else 32, right_columns(r)


def right_columns(r: int) -> int:
    """Columns of d_right that a program computes, for a padded rank."""
    return 128 if r < 64 else 64


def launch_sums(tiles: Tensor, table: Tensor, totals: Tensor, scale: float, dtype: torch.dtype, plain: bool) -> None:
    """Compute the sums of all layers.

    Args:
        tiles: block and tile of each program, int32.
        table: ``(blocks, FIELDS)``, int64.
        totals: what all sums are written to, in their dtype.
        scale: factor of the product.
        dtype: of W0.
        plain: whether each W0 is contiguous and starts, as its rows do, at a multiple of 16 elements; so does A.
    """
    constants = TL_DTYPES[dtype], *SUM_TILE, SUM_RANKS, plain
    registers = 64 if plain else 128  # of each thread: more programs run at the same time
    _sums[(len(tiles),)](tiles, table, totals, scale, *constants, num_warps=8, num_stages=2, maxnreg=registers)


def launch_gradients(
    tiles: Tensor, of_lefts: int, table: Tensor, addresses: Tensor, results: Tensor, r: int, scale: float,
    dtype: torch.dtype, plain: bool,
) -> None:  # fmt: skip
    """Compute the gradients of B and of A of all layers, in one launch: it takes the host longer than the GPU.

    Args:
        tiles: block and tile of each program, first of those for B.
        of_lefts: programs for B.
        table: ``(blocks, FIELDS)``, int64.
        addresses: of dW (0: none), B and A of all blocks, then their ``INNER`` for dW; int64.
        results: what all gradients are written to, fp32.
        r: the largest rank, padded.
        scale: factor of the product.
        dtype: of dW.
        plain: as for the sums, of dW.
    """
    constants = TL_DTYPES[dtype], *left_tile(r, dtype), *right_tile(r, dtype), r, plain
    arguments = tiles, table, addresses, results, len(table), of_lefts, scale, *constants
    _gradients[(len(tiles),)](*arguments, num_warps=4, num_stages=3)
