"""Merge ``W = W0 + scale * B A`` so that W0 can be restored bit for bit.

``(W0 + delta) - delta`` is not ``W0`` in floating point. But where delta is small against W0, most elements round back
to W0, so it is enough to keep the others. Both times delta must have the same bits. So it is computed by elementwise
products and sums in a fixed order: the bits of a matrix product depend on the library, the number of threads, autocast
and the precision setting.

Tensors are compared by their bits: -0 differs from 0, and a NaN equals itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 15  # elements per step on a CPU: they fit into its cache, and torch uses one thread for them
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 / golden ratio as a signed integer; multiplying by an odd number is reversible


def as_integers(tensor: Tensor) -> Tensor:
    """``tensor`` reinterpreted as integers of the same width."""
    return tensor.detach().view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit; they may be on different devices."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    first, second = first.detach().reshape(-1), second.detach().to(first.device).reshape(-1)
    return torch.equal(as_integers(first), as_integers(second))


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of words and positions, equal on every device; a change of any single word changes it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    words = raw.view(torch.int64)
    factors = _odd_numbers(min(BLOCK, words.numel()), words.device) * _ODD
    rows = 1 if words.device.type == "cpu" else 128
    sums = [_weighted(words[start : start + rows * BLOCK], factors) for start in range(0, words.numel(), rows * BLOCK)]
    total = torch.cat(sums) if sums else words.new_zeros(0)
    count = total.numel()
    of_sums = factors[:count] if count <= len(factors) else _odd_numbers(count, words.device) * _ODD
    return int(_mixed(total, of_sums).sum())


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return 2 * torch.arange(count, device=device) + 1


def _weighted(words: Tensor, factors: Tensor) -> Tensor:
    """The sum of the mixed products of ``words`` and ``factors`` for each block; the last block may be shorter."""
    if words.numel() % len(factors):
        end = words.numel() // len(factors) * len(factors)  # of the last full block
        rest = _mixed(words[end:], factors[: words.numel() - end]).sum().view(1)
        return torch.cat([_weighted(words[:end], factors), rest]) if end else rest
    return _mixed(words.view(-1, len(factors)), factors).sum(1)


def _mixed(words: Tensor, factors: Tensor) -> Tensor:
    """Products, their upper half folded onto the lower: without it, swapping two words of opposite sign is not seen."""
    products = words * factors
    return products ^ (products >> 32)


Factors = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Patch:
    """Values of a matrix: all of them, or those at ``index`` of the flattened matrix."""

    values: Tensor
    index: Tensor | None = None

    def nbytes(self) -> int:
        """Its memory in bytes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


@dataclass
class MergedMatrix:
    """The result of adding delta to a matrix.

    Args:
        merged: the sum, rounded once to the dtype of the matrix.
        roundtrip: ``merged - delta``, rounded: equal to the matrix except for a few elements.
        lost: the norm of the rounding error of ``merged``, divided by the norm of delta.
        size: the Frobenius norm of delta.
    """

    merged: Tensor
    roundtrip: Tensor
    lost: float
    size: float


def delta_blocks(matrix: Tensor, factors: Factors) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over delta, the sum of ``left @ right`` over ``factors``, in blocks of rows, in fp32 or fp64.

    Blocks fit into the cache of a CPU. They share one buffer: each is overwritten by the next.
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
def add_delta(matrix: Tensor, factors: Factors) -> MergedMatrix:
    """``matrix`` plus the sum of ``left @ right`` over ``factors``."""
    merged, roundtrip = torch.empty_like(matrix), torch.empty_like(matrix)
    error = squares = 0.0
    for rows, delta in delta_blocks(matrix, factors):
        exact = matrix[rows].to(delta.dtype) + delta
        merged[rows] = exact
        roundtrip[rows] = merged[rows].to(delta.dtype) - delta
        rounding = merged[rows].double() - matrix[rows].double() - delta.double()
        error += _squares(rounding.nan_to_num_(0, 0, 0))  # a NaN or infinite weight loses nothing
        squares += _squares(delta)
    return MergedMatrix(merged, roundtrip, math.sqrt(error / squares) if squares else 0.0, math.sqrt(squares))


@torch.no_grad()
def merged_matrix(matrix: Tensor, factors: Factors) -> Tensor:
    """The sum that :func:`add_delta` computes, without the numbers that a merge records."""
    result = torch.empty_like(matrix)
    for rows, delta in delta_blocks(matrix, factors):
        result[rows] = matrix[rows].to(delta.dtype) + delta
    return result


@torch.no_grad()
def subtract_delta(matrix: Tensor, factors: Factors) -> Tensor:
    """``matrix`` minus the sum of ``left @ right`` over ``factors``: the original except for a few elements."""
    result = torch.empty_like(matrix)
    for rows, delta in delta_blocks(matrix, factors):
        result[rows] = matrix[rows].to(delta.dtype) - delta
    return result


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


@torch.no_grad()
def patch_for(original: Tensor, roundtrip: Tensor) -> Patch:
    """The patch that turns ``roundtrip`` into ``original``: the differing elements, or a copy where that is smaller."""
    differing = (as_integers(original) != as_integers(roundtrip)).flatten().nonzero().flatten()
    index = differing.to(torch.int32 if original.numel() < 2**31 else torch.int64)
    sparse = Patch(original.flatten()[differing].cpu(), index.cpu())
    return sparse if sparse.nbytes() < original.nbytes else Patch(original.to("cpu", copy=True))


@torch.no_grad()
def apply_patch(roundtrip: Tensor, patch: Patch) -> Tensor:
    """``roundtrip`` with the elements of ``patch`` replaced: the original, bit for bit."""
    values = patch.values.to(roundtrip.device)
    if patch.index is None:
        return values
    flat = roundtrip.flatten()
    flat[patch.index.to(roundtrip.device, torch.int64)] = values
    return flat.view_as(roundtrip)
