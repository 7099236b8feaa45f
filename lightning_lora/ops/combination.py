"""One low-rank update in place of several: stacked exactly, the nearest of a rank, TIES and DARE.

TIES and DARE act on the elements of the deltas, so these are built; the result is the nearest of rank r to what they
give. The other two need no matrix larger than the factors.

Each of :data:`KINDS` gets the factors of each delta, weighted: B ``(out_features, r_i)`` and A ``(r_i, in_features)``;
the rank of the result, the sum of all r_i where they are stacked; ``density``, the share of the largest elements that
TIES keeps, or the probability with which DARE keeps one; and a generator of random numbers for each delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_lora.ops.low_rank import DeltaFactors, LowRank, truncated_svd

Combination = Callable[[Sequence[DeltaFactors], int, float, Sequence[torch.Generator]], LowRank]


def stack(updates: Sequence[DeltaFactors], r: int, density: float, generators: Sequence[torch.Generator]) -> LowRank:
    """The sum of ``updates``, exactly: A stacked, B side by side."""
    B, A = stacked(updates)
    return LowRank(A.float(), B.float(), 1.0)


def nearest(updates: Sequence[DeltaFactors], r: int, density: float, generators: Sequence[torch.Generator]) -> LowRank:
    """The nearest of rank ``r`` to the sum of ``updates``, by QR of the stacked factors and an SVD of their product."""
    B, A = stacked(updates)
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    core = truncated_svd(left.R @ right.R.T, r)
    return LowRank((core.A.double() @ right.Q.T).float(), (left.Q @ core.B.double()).float(), core.energy)


def stacked(updates: Sequence[DeltaFactors]) -> DeltaFactors:
    """Factors of the sum of ``updates``, which may be stacks of matrices."""
    return torch.cat([B for B, _ in updates], -1), torch.cat([A for _, A in updates], -2)


def ties(updates: Sequence[DeltaFactors], r: int, density: float, generators: Sequence[torch.Generator]) -> LowRank:
    """The nearest of rank ``r`` to the TIES merge of ``updates``.

    Source: Yadav et al. 2023 (arXiv 2306.01708), algorithm 1.
    """
    merged = disjoint_mean([trimmed(_product(update), density) for update in updates])
    return truncated_svd(merged.float(), r)  # of a large matrix ten times as fast as in fp64


def trimmed(delta: Tensor, density: float) -> Tensor:
    """``delta`` with its largest elements alone.

    Args:
        delta: any matrix.
        density: the share of elements that is kept, at least one of them.
    """
    flat = delta.flatten()
    kept = flat.abs().topk(max(1, round(density * len(flat))), sorted=False).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(delta)


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """For each element the mean over those ``deltas`` that are not zero there and have the sign of the sum."""
    sign = sum(deltas, torch.zeros_like(deltas[0])).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in deltas:
        agrees = (delta.sign() == sign) & (delta != 0)
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def dare(updates: Sequence[DeltaFactors], r: int, density: float, generators: Sequence[torch.Generator]) -> LowRank:
    """The nearest of rank ``r`` to the sum of what DARE leaves of each of ``updates``.

    The generators are on the CPU, so that the same elements are dropped on every device.

    Source: Yu et al. 2023 (arXiv 2311.03099), equations 1 and 2.
    """
    deltas = map(_product, updates)
    kept = [rescaled(delta, density, generator) for delta, generator in zip(deltas, generators, strict=True)]
    return truncated_svd(torch.stack(kept).sum(0).float(), r)


def rescaled(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """``delta / density`` where a random number is below ``density``, zero elsewhere: its expectation is ``delta``."""
    random = torch.rand(delta.shape, generator=generator)
    return torch.where((random < density).to(delta.device), delta / density, 0.0)


def _product(update: DeltaFactors) -> Tensor:
    B, A = update
    return B.double() @ A.double()


KINDS: dict[str, Combination] = {"cat": stack, "svd": nearest, "ties": ties, "dare": dare}
