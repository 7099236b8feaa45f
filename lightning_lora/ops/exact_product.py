"""Matrix products that have the same bits on every machine, though any matrix library may compute them.

The last bits of a matrix product depend on the order in which it is summed, so on the library, the device and the
number of threads. But where fp64 holds every partial sum exactly, no order changes a bit, and neither does a fused
multiply-add. So each factor is split into slices of a few bits, on a grid for each row of ``left`` and for each column
of ``right``. Products of slices lie on a common grid, and their sums need no more than the 53 bits of fp64.

Source: Ozaki et al. 2012, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications" (doi 10.1007/s11075-011-9478-1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 53  # bits of an fp64 number
PRODUCTS = {torch.float32: 1, torch.float64: 3}  # exact products that together are as precise as the dtype
SMALLEST = 2.0**-400  # where all numbers of a grid are smaller, products of their slices may be no fp64 numbers
_EXPONENT = 0x7FF0000000000000  # the bits of an fp64 number that hold its exponent


@dataclass(frozen=True)
class ExactProduct:
    """``left @ right``, as a sum of products that are exact in fp64; made by :func:`exact_product`.

    Args:
        terms: the factors of these products, in fp64; the largest product comes first.
    """

    terms: list[tuple[Tensor, Tensor]]

    def part(self, rows: slice, columns: slice = slice(None)) -> ExactProduct:
        """Some rows and columns, with the bits that they have in the whole product."""
        return ExactProduct([(left[rows], right[:, columns]) for left, right in self.terms])

    def compute(self, out: Tensor) -> Tensor:
        """Write the product into ``out``, which is in fp64."""
        (left, right), *smaller = self.terms
        torch.mm(left, right, out=out)
        for left, right in smaller:
            out += left @ right
        return out


def exact_product(factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> ExactProduct:
    """The sum of ``left @ right`` over ``factors``.

    Relative to the largest product of an element in the row of ``left`` and one in the column of ``right`` it is
    precise to 26 bits or more for fp32, up to r = 1024, and to 53 or more for fp64.

    Args:
        factors: at least one pair of shapes ``(rows, r)`` and ``(r, columns)``. They must be whole: the rows of
            ``right`` are scaled by their largest elements.
        dtype: fp32 or fp64, the precision that the sum has at least.

    Example:
        >>> product = exact_product([(torch.ones(2, 1), torch.full((1, 2), 0.5))], torch.float32)
        >>> product.compute(torch.empty(2, 2, dtype=torch.float64)).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    left = torch.cat([left.double() for left, _ in factors], 1)
    right = torch.cat([right.double() for _, right in factors], 0)
    # Otherwise the grid of a column would be that of the largest row of `right`, however small its partner in `left`.
    sizes = _power_of_two(right.abs().amax(1))
    left, right = left * sizes, right / sizes.unsqueeze(1)
    count = 2 * PRODUCTS[dtype]
    # One product of slices is at most 2 ** (3 * bits + 2) steps of the common grid, and a sum has r * count of them.
    bits = (DIGITS - 2 - (len(right) * count).bit_length()) // 3
    return ExactProduct(_terms(_slices(left, 1, bits, count), _slices(right, 0, bits, count)))


def _terms(left: list[Tensor], right: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The factors of all products of slices ``i`` and ``j`` with ``i + j < len(left)``.

    Those with ``i + j`` equal to 0 or 1 are summed in the first product, those with 2 or 3 in the second, and so on.
    """
    terms = []
    for last in range(1, len(left), 2):
        partners = [right[last - i] + right[last - i - 1] for i in range(last)]
        terms.append((torch.cat(left[: last + 1], 1), torch.cat([*partners, right[0]], 0)))
    return terms


def _slices(matrix: Tensor, dim: int, bits: int, count: int) -> list[Tensor]:
    """Matrices whose sum is nearly ``matrix``: the first has its highest ``bits``, the second the next, and so on.

    A grid is that of the largest element along ``dim``.
    """
    step, slices = _power_of_two(matrix.abs().amax(dim, keepdim=True)), []
    for _ in range(count):
        step = step * 2.0**-bits
        slices.append((matrix / step).round_() * step)
        matrix = matrix - slices[-1]
    return slices


def _power_of_two(numbers: Tensor) -> Tensor:
    """The largest power of two that is not above each number, or ``SMALLEST``; 1 for infinity and NaN."""
    power = (numbers.view(torch.int64) & _EXPONENT).view(torch.float64)
    return power.masked_fill_(power == math.inf, 1.0).clamp_(min=SMALLEST)
