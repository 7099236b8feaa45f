"""Compute the matrix of a weight in the 4-bit formats of bitsandbytes, NF4 and FP4.

Each number is a code, of which two are in a byte, times the largest absolute value of its block. In a nested format
the latter is an 8-bit code times the largest absolute value of a block of blocks, plus an offset. bitsandbytes computes
it by one kernel, or by three in a nested format; on a GPU that Triton can use, one kernel computes either.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import supports_kernels


class Nested(NamedTuple):
    """How the largest absolute values of blocks are stored in a nested format.

    Args:
        absmax: of each block of blocks, one vector in fp32.
        table: the number of each 8-bit code, ``(256,)`` in fp32.
        offset: that is added to each product, one number.
        blocksize: blocks in a block of blocks.
    """

    absmax: Tensor
    table: Tensor
    offset: Tensor
    blocksize: int


class FourBits(NamedTuple):
    """A weight in four bits.

    Args:
        codes: two in a byte, the first one in the higher half; of any shape and dtype.
        absmax: the largest absolute value of each block, one vector in fp32; in a nested format of 8-bit codes.
        table: the number of each code, ``(16,)`` in fp32.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: numbers in a block.
        shape: of the matrix, ``(out_features, in_features)``.
        nested: ``None`` unless the format is nested.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    nested: Nested | None

    @classmethod
    def of(cls, codes: Tensor, state: Any) -> FourBits:
        """The weight of these codes and bitsandbytes' ``QuantState``."""
        inner = state.state2 if state.nested else None
        nested = None if inner is None else Nested(inner.absmax, inner.code, state.offset, inner.blocksize)
        return cls(codes, state.absmax, state.code, state.quant_type, state.blocksize, tuple(state.shape), nested)


def dequantize_4bit(weight: FourBits, dtype: torch.dtype) -> Tensor:
    """The matrix of ``weight``, whose numbers are computed in fp32 and rounded once to ``dtype``."""
    device = weight.codes.get_device()  # -1 is a CPU; Triton launches on the current GPU alone
    if device >= 0 and weight.codes.is_cuda and device == torch.cuda.current_device() and supports_kernels(device):
        from lightning_lora.ops.packed import four_bit_kernels as kernels

        codes, absmax, table, _, blocksize, shape, nested = weight
        return kernels.dequantize(codes, absmax, table, blocksize, shape, nested, dtype)
    return by_the_library(weight, dtype)


def by_the_library(weight: FourBits, dtype: torch.dtype) -> Tensor:
    """The same by the operators of bitsandbytes, which is loaded where a layer has such a weight."""
    library: Any = torch.ops.bitsandbytes
    codes, absmax, _, quant_type, blocksize, shape, nested = weight
    if nested is not None:
        absmax = library.dequantize_blockwise(absmax, nested.absmax, nested.table, nested.blocksize, torch.float32)
        absmax = (absmax + nested.offset).float()
    # Its kernel for CPUs takes blocks to begin with a row, but a block may go on in the next one.
    count = math.prod(shape)
    rows = (count // blocksize, blocksize) if count % blocksize == 0 else (1, count)
    matrix: Tensor = library.dequantize_4bit(codes, absmax, blocksize, quant_type, rows, dtype)
    return matrix.view(shape)


def rows_by_torch(weight: FourBits, rows: slice) -> Tensor:
    """Some rows of the matrix of ``weight`` in fp32, by torch alone: files are read where bitsandbytes may be missing.

    Args:
        weight: on the CPU, its ``codes`` one vector of bytes.
        rows: with a start and a stop. A block may begin or end within a row.
    """
    width, blocksize = weight.shape[1], weight.blocksize
    start, stop = rows.start * width, rows.stop * width
    pairs = weight.codes[start // 2 : (stop + 1) // 2]
    codes = torch.stack([pairs >> 4, pairs & 0xF], 1).view(-1)[start % 2 :][: stop - start]
    first = start // blocksize
    largest = _largest_by_torch(weight, slice(first, -(-stop // blocksize))).repeat_interleave(blocksize)
    matrix = weight.table[codes.int()]
    return matrix.mul_(largest[start - first * blocksize :][: stop - start]).view(-1, width)


def _largest_by_torch(weight: FourBits, blocks: slice) -> Tensor:
    """The largest absolute values of some blocks in fp32."""
    largest, nested = weight.absmax[blocks], weight.nested
    if nested is None:
        return largest.float()
    of_blocks = nested.absmax[torch.arange(blocks.start, blocks.stop) // nested.blocksize]
    return nested.table[largest.int()] * of_blocks + nested.offset
