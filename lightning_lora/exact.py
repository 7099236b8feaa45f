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

from lightning_lora.adapter import Adapter
from lightning_lora.bits import bits

_BLOCK = 1 << 20


@dataclass
class Patch:
    """Elements of a matrix: all of them, or those at ``index`` of the flattened matrix."""

    values: Tensor
    index: Tensor | None = None

    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


def delta_blocks(adapters: Sequence[Adapter], matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``scale * B A`` summed over ``adapters``, in blocks of rows of ``matrix``, at least in fp32."""
    out_features, in_features = matrix.shape
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    pairs = [(a.A.detach().to(matrix.device, dtype), a.B.detach().to(matrix.device, dtype) * a.scale) for a in adapters]
    rows = max(1, _BLOCK // max(1, in_features))
    for start in range(0, out_features, rows):
        block = slice(start, min(start + rows, out_features))
        total = torch.zeros(block.stop - start, in_features, dtype=dtype, device=matrix.device)
        for A, B in pairs:
            for k in range(len(A)):
                total += B[block, k : k + 1] * A[k : k + 1]
        yield block, total


@torch.no_grad()
def add(matrix: Tensor, adapters: Sequence[Adapter]) -> float:
    """Add delta in place, rounding once; returns the share of delta's norm that the rounding lost."""
    lost = whole = 0.0
    for rows, delta in delta_blocks(adapters, matrix):
        exact = matrix[rows].to(delta.dtype) + delta
        rounded = exact.to(matrix.dtype)
        lost += float((rounded.to(delta.dtype) - exact).square().sum(dtype=torch.float64))
        whole += float(delta.square().sum(dtype=torch.float64))
        matrix[rows] = rounded
    return math.sqrt(lost / whole) if whole else 0.0


@torch.no_grad()
def subtracted(matrix: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """A new matrix: ``matrix`` without delta, rounded; nearly what it was before :func:`add`."""
    result = torch.empty_like(matrix)
    for rows, delta in delta_blocks(adapters, matrix):
        result[rows] = (matrix[rows].to(delta.dtype) - delta).to(matrix.dtype)
    return result


@torch.no_grad()
def patch_for(original: Tensor, nearly: Tensor) -> Patch:
    """What turns ``nearly`` into ``original``: the wrong elements, or a plain copy where that is smaller."""
    wrong = (bits(original.contiguous()) != bits(nearly.contiguous())).flatten().nonzero().flatten()
    index = wrong.to(torch.int32 if original.numel() < 2**31 else torch.int64)
    sparse = Patch(original.flatten()[wrong].cpu(), index.cpu())
    return sparse if sparse.nbytes() < original.nbytes else Patch(original.detach().clone().cpu())


@torch.no_grad()
def patched(nearly: Tensor, patch: Patch) -> Tensor:
    """``nearly`` with the elements of ``patch`` put in."""
    values = patch.values.to(nearly.device)
    if patch.index is None:
        return values
    flat = nearly.contiguous().flatten()
    flat[patch.index.to(nearly.device, torch.int64)] = values
    return flat.view_as(nearly)
