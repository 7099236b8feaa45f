"""Adding delta to a weight so that it can be taken away again bit for bit.

``(W + delta) - delta`` is not ``W`` in floating point. But where delta is small against W it nearly always rounds to W,
so it is enough to keep the elements where it does not. That needs the very same delta twice: it is summed in a fixed
order by separate elementwise products and sums, whose bits depend on no matrix library, thread count, autocast or
precision setting, as a GEMM's do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.ops.bits import BLOCK, bits

Factors = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Patch:
    """Elements of a matrix: all of them, or those at ``index`` of the flattened matrix."""

    values: Tensor
    index: Tensor | None = None

    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


@dataclass
class Sum:
    """A matrix after delta was added.

    Args:
        merged: the sum, rounded once to the matrix's dtype.
        nearly: the sum without delta again, rounded: the matrix, but for a few elements.
        lost: the share of delta's norm that rounding the sum lost.
        size: delta's norm.
    """

    merged: Tensor
    nearly: Tensor
    lost: float
    size: float


def delta_blocks(matrix: Tensor, factors: Factors) -> Iterator[tuple[slice, Tensor]]:
    """The sum of ``left @ right`` over ``factors``, in blocks of rows of ``matrix``, at least in fp32.

    Blocks are sized for the processor's cache, and share one buffer: use each before asking for the next.
    """
    height, width = matrix.shape
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    pairs = [(left.to(matrix.device, dtype), right.to(matrix.device, dtype)) for left, right in factors]
    rows = max(1, (BLOCK if matrix.device.type == "cpu" else BLOCK * 128) // max(1, width))
    total, product = (torch.empty(rows, width, dtype=dtype, device=matrix.device) for _ in range(2))
    for start in range(0, height, rows):
        block = slice(start, min(start + rows, height))
        count = block.stop - start
        total.zero_()
        for left, right in pairs:
            for k in range(len(right)):
                torch.mul(left[block, k : k + 1], right[k : k + 1], out=product[:count])
                total[:count] += product[:count]
        yield block, total[:count]


@torch.no_grad()
def added(matrix: Tensor, factors: Factors) -> Sum:
    """``matrix`` with the sum of ``left @ right`` added."""
    merged, nearly = torch.empty_like(matrix), torch.empty_like(matrix)
    lost = whole = 0.0
    for rows, delta in delta_blocks(matrix, factors):
        exact = matrix[rows].to(delta.dtype) + delta
        merged[rows] = exact
        nearly[rows] = merged[rows].to(delta.dtype) - delta
        rounding = merged[rows].double() - matrix[rows].double() - delta.double()
        lost += _squares(rounding.nan_to_num_(0, 0, 0))  # a weight that is no number lost nothing
        whole += _squares(delta)
    return Sum(merged, nearly, math.sqrt(lost / whole) if whole else 0.0, math.sqrt(whole))


@torch.no_grad()
def subtracted(matrix: Tensor, factors: Factors) -> Tensor:
    """``matrix`` without the sum of ``left @ right``: nearly what it was before that was added."""
    result = torch.empty_like(matrix)
    for rows, delta in delta_blocks(matrix, factors):
        result[rows] = matrix[rows].to(delta.dtype) - delta
    return result


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


@torch.no_grad()
def patch_for(original: Tensor, nearly: Tensor) -> Patch:
    """What turns ``nearly`` into ``original``: the wrong elements, or a plain copy where that is smaller."""
    wrong = (bits(original) != bits(nearly)).flatten().nonzero().flatten()
    index = wrong.to(torch.int32 if original.numel() < 2**31 else torch.int64)
    sparse = Patch(original.flatten()[wrong].cpu(), index.cpu())
    return sparse if sparse.nbytes() < original.nbytes else Patch(original.to("cpu", copy=True))


@torch.no_grad()
def patched(nearly: Tensor, patch: Patch) -> Tensor:
    """``nearly`` with the elements of ``patch`` put in."""
    values = patch.values.to(nearly.device)
    if patch.index is None:
        return values
    flat = nearly.flatten()
    flat[patch.index.to(nearly.device, torch.int64)] = values
    return flat.view_as(nearly)
