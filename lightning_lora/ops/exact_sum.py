"""Add delta to a weight so that it can be subtracted again bit for bit.

``(W + delta) - delta`` is not ``W`` in floating point. But where delta is small against W it mostly rounds to W, so it
is enough to keep the elements where it does not. That needs the very same delta twice: it is summed in a fixed order by
separate elementwise products and sums. A GEMM's bits depend on the matrix library, the number of threads, autocast and
the precision setting; these do not.

Tensors are compared by their bits: -0 is not 0, and a NaN equals itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 15  # elements worked on at once on a CPU: they stay in its cache, and one thread does them
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 / golden ratio as a signed integer: an odd factor loses no bit of a product


def bits(tensor: Tensor) -> Tensor:
    """``tensor`` seen as integers of its width."""
    return tensor.detach().view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, wherever they live."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach().reshape(-1), other.detach().to(one.device).reshape(-1)
    return torch.equal(bits(one), bits(other))


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum over words and their places, the same on every device; a change of any one word changes it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    words = raw.view(torch.int64)
    factors = _odd_numbers(BLOCK, words.device) * _ODD
    rows = 1 if words.device.type == "cpu" else 128
    sums = [_weighted(words[start : start + rows * BLOCK], factors) for start in range(0, words.numel(), rows * BLOCK)]
    total = torch.cat(sums) if sums else words.new_zeros(0)
    return int(_mixed(total, _odd_numbers(total.numel(), words.device) * _ODD).sum())


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return 2 * torch.arange(count, device=device) + 1


def _weighted(words: Tensor, factors: Tensor) -> Tensor:
    """For each block of ``words`` the sum of its mixed products with ``factors``; the last block may be short."""
    if words.numel() % len(factors):
        whole = words.numel() // len(factors) * len(factors)
        rest = _mixed(words[whole:], factors[: words.numel() - whole]).sum().view(1)
        return torch.cat([_weighted(words[:whole], factors), rest]) if whole else rest
    return _mixed(words.view(-1, len(factors)), factors).sum(1)


def _mixed(words: Tensor, factors: Tensor) -> Tensor:
    """Products folded on themselves, one to one: without the fold two words of opposite sign could change places."""
    products = words * factors
    return products ^ (products >> 32)


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
        roundtrip: the sum without delta again, rounded: the matrix, but for a few elements.
        lost: the share of delta's norm that rounding the sum lost.
        size: delta's norm.
    """

    merged: Tensor
    roundtrip: Tensor
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
    merged, roundtrip = torch.empty_like(matrix), torch.empty_like(matrix)
    lost = whole = 0.0
    for rows, delta in delta_blocks(matrix, factors):
        exact = matrix[rows].to(delta.dtype) + delta
        merged[rows] = exact
        roundtrip[rows] = merged[rows].to(delta.dtype) - delta
        rounding = merged[rows].double() - matrix[rows].double() - delta.double()
        lost += _squares(rounding.nan_to_num_(0, 0, 0))  # a weight that is no number lost nothing
        whole += _squares(delta)
    return Sum(merged, roundtrip, math.sqrt(lost / whole) if whole else 0.0, math.sqrt(whole))


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
def patch_for(original: Tensor, roundtrip: Tensor) -> Patch:
    """What turns ``roundtrip`` into ``original``: the wrong elements, or a plain copy where that is smaller."""
    wrong = (bits(original) != bits(roundtrip)).flatten().nonzero().flatten()
    index = wrong.to(torch.int32 if original.numel() < 2**31 else torch.int64)
    sparse = Patch(original.flatten()[wrong].cpu(), index.cpu())
    return sparse if sparse.nbytes() < original.nbytes else Patch(original.to("cpu", copy=True))


@torch.no_grad()
def patched(roundtrip: Tensor, patch: Patch) -> Tensor:
    """``roundtrip`` with the elements of ``patch`` put in."""
    values = patch.values.to(roundtrip.device)
    if patch.index is None:
        return values
    flat = roundtrip.flatten()
    flat[patch.index.to(roundtrip.device, torch.int64)] = values
    return flat.view_as(roundtrip)
