"""The truncated SVD of a matrix, and norms of ``delta = B A`` without building delta.

The truncated SVD is the best approximation of rank r (Eckart and Young 1936). Small matrices are decomposed in full, in
fp64. For large ones only the leading subspace is computed, by :func:`torch.svd_lowrank` from more random vectors than
needed (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 5.1).

Norms use ``||B A||^2 = tr(A^T B^T B A) = <B^T B, A A^T>``: two Gram matrices of r x r for a layer of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DeltaFactors = tuple[Tensor, Tensor]  # scale * B (out_features, r), and A (r, in_features)


def inner(first: DeltaFactors, second: DeltaFactors) -> float:
    """The Frobenius inner product of two deltas.

    Example:
        >>> first, second = (torch.eye(2), torch.ones(2, 3)), (torch.ones(2, 1), torch.ones(1, 3))
        >>> inner(first, second)
        6.0
    """
    (B, A), (D, C) = _in_fp64(first), _in_fp64(second)
    return float(((B.T @ D) * (A @ C.T)).sum())


def norm(pair: DeltaFactors) -> float:
    """The Frobenius norm of delta."""
    square = inner(pair, pair)
    return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN


def distance(first: DeltaFactors, second: DeltaFactors) -> float:
    """The Frobenius norm of the difference of two deltas.

    By QR of ``[B, -D]`` and of ``[A; C]``: Gram matrices lose differences below 1e-8 of the norm to rounding.
    """
    (B, A), (D, C) = _in_fp64(first), _in_fp64(second)
    left, right = torch.cat([B, -D], 1), torch.cat([A, C], 0)
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T))


def cosine(first: DeltaFactors, second: DeltaFactors) -> float | None:
    """The cosine of the angle between two deltas, ``None`` where one of them is zero."""
    norms = norm(first) * norm(second)
    return max(-1.0, min(1.0, inner(first, second) / norms)) if norms else None


def _in_fp64(pair: DeltaFactors) -> DeltaFactors:
    return pair[0].double(), pair[1].double()


FULL_SVD = 512  # largest smaller side of a matrix that is decomposed in full
OVERSAMPLING = 16  # random vectors in addition to r
ITERATIONS = 32  # of subspace iteration; white noise, the slowest case, then has 99.9 % of the best energy


@dataclass(frozen=True)
class LowRank:
    """An approximation ``B A`` of a matrix.

    Args:
        A: shape ``(r, in_features)``.
        B: shape ``(out_features, r)``; the singular values are shared evenly between the two.
        energy: the squared Frobenius norm of ``B A``, divided by that of the matrix.
    """

    A: Tensor
    B: Tensor
    energy: float


@torch.no_grad()
def truncated_svd(matrix: Tensor, r: int) -> LowRank:
    """The best approximation of rank ``r``; if ``matrix`` has fewer rows or columns, the other rows of A are zero.

    Args:
        matrix: shape ``(out_features, in_features)``.
        r: rank.

    Example:
        >>> low_rank = truncated_svd(torch.diag(torch.tensor([3.0, 4.0])), 1)
        >>> round(low_rank.energy, 4), (low_rank.B @ low_rank.A).round(decimals=4)[1, 1].item()
        (0.64, 4.0)
    """
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    U, S, V = _full(matrix) if min(matrix.shape) <= max(FULL_SVD, 2 * (r + OVERSAMPLING)) else _leading(matrix, r)
    root = S[:r].sqrt()
    A, B = root[:, None] * V[:r], U[:, :r] * root
    missing = r - len(root)
    A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
    energy = float(S[:r].double().square().sum()) / total if total else 1.0
    return LowRank(A.float().contiguous(), B.float().contiguous(), min(1.0, energy))


def _full(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, S, V


def _leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``r + OVERSAMPLING`` leading singular vectors and values of a large ``matrix``."""
    gpus = [matrix.device.index] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=gpus):  # the same vectors at every call, and none from the user's stream
        for generator in [torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)]:
            generator.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=r + OVERSAMPLING, niter=ITERATIONS)
    return U, S, V.T
