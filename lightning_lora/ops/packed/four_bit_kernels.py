"""Triton kernel for the matrix of a weight in four bits; imported only where Triton can be used.

It rounds where bitsandbytes rounds: the offset is added to a rounded product, so that the two must not be fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers that a program computes


@triton.jit
def _dequantize(
    codes, table, absmax, nested_absmax, nested_table, offset, matrix, count, nested_blocksize,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    here = block * BLOCK < count
    if NESTED:
        code = tl.load(absmax + block, mask=here, other=0).to(tl.int32)
        of_blocks = tl.load(nested_absmax + block // nested_blocksize, mask=here, other=0.0)
        largest = tl.load(nested_table + code) * of_blocks + tl.load(offset)
    else:
        largest = tl.load(absmax + block, mask=here, other=0.0)
    at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(codes + at, mask=at * 2 < count, other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * largest[:, None]
    second = tl.load(table + (pair & 15)) * largest[:, None]
    dtype = matrix.dtype.element_ty
    numbers = tl.interleave(first.to(dtype), second.to(dtype))
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(matrix + at, numbers, mask=at < count)


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix of a weight in four bits; the arguments are the fields of ``FourBits`` and ``Nested``."""
    matrix = torch.empty(shape, dtype=dtype, device=codes.device)
    count, blocks = matrix.numel(), max(1, TILE // blocksize)
    codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    inner = (table, table, table) if nested is None else nested[:3]  # without nesting nothing reads them
    nested_blocksize = 1 if nested is None else nested[3]
    _dequantize[(triton.cdiv(count, blocks * blocksize),)](
        codes, table, absmax, *inner, matrix, count, nested_blocksize,
        blocksize, blocks, nested is not None, enable_fp_fusion=False,
    )  # fmt: skip
    return matrix
