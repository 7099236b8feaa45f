"""The best approximation of a matrix by one of rank r, and norms of ``delta = B A`` without building delta.

The approximation is the truncated SVD (Eckart and Young 1936). Small matrices are decomposed in full, in fp64. For
large ones only the leading subspace is computed, by subspace iteration from more random vectors than needed (Halko,
Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), until what it captures stops growing.

Norms use ``||B A||^2 = tr(A^T B^T B A) = <B^T B, A A^T>``: two Gram matrices of r x r, whatever the size of the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # B (out, r) with the scale in it, and A (r, in)


def inner(one: Pair, other: Pair) -> float:
    """The inner product of two deltas, the sum of the products of their elements.

    Example:
        >>> one, other = (torch.eye(2), torch.ones(2, 3)), (torch.ones(2, 1), torch.ones(1, 3))
        >>> inner(one, other)
        6.0
    """
    (B, A), (D, C) = _doubles(one), _doubles(other)
    return float(((B.T @ D) * (A @ C.T)).sum())


def norm(pair: Pair) -> float:
    """The Frobenius norm of delta."""
    square = inner(pair, pair)
    return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN


def distance(one: Pair, other: Pair) -> float:
    """The Frobenius norm of the difference of two deltas.

    By QR of ``[B, -D]`` and of ``[A; C]``: in Gram matrices the difference of near deltas drowns at 1e-8 of their norm.
    """
    (B, A), (D, C) = _doubles(one), _doubles(other)
    left, right = torch.cat([B, -D], 1), torch.cat([A, C], 0)
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T))


def cosine(one: Pair, other: Pair) -> float | None:
    """The cosine of the angle between two deltas, ``None`` where one of them is zero."""
    size = norm(one) * norm(other)
    return max(-1.0, min(1.0, inner(one, other) / size)) if size else None


def _doubles(pair: Pair) -> Pair:
    return pair[0].double(), pair[1].double()


FULL = 512  # the smaller side up to which the whole SVD is made
SPARE = 16  # vectors beyond r
ROUNDS = 60  # at most
GROWTH = 1e-6  # of the captured energy in one round, below which it stops


@dataclass(frozen=True)
class LowRank:
    """``B A`` near a matrix.

    Args:
        A: shape ``(r, in_features)``.
        B: shape ``(out_features, r)``; the singular values are shared evenly between the two.
        energy: the share of the matrix's squared Frobenius norm that ``B A`` has.
    """

    A: Tensor
    B: Tensor
    energy: float


@torch.no_grad()
def best_rank(matrix: Tensor, r: int) -> LowRank:
    """The matrix of rank ``r`` nearest to ``matrix``; rows beyond the rank that it can have are zero.

    Args:
        matrix: shape ``(out_features, in_features)``.
        r: rank.

    Example:
        >>> near = best_rank(torch.diag(torch.tensor([3.0, 4.0])), 1)
        >>> round(near.energy, 4), (near.B @ near.A).round(decimals=4)[1, 1].item()
        (0.64, 4.0)
    """
    whole = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    U, S, V = _full(matrix) if min(matrix.shape) <= max(FULL, 2 * (r + SPARE)) else _leading(matrix, r)
    root = S[:r].sqrt()
    A, B = root[:, None] * V[:r], U[:, :r] * root
    missing = r - len(root)
    A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
    energy = float(S[:r].double().square().sum()) / whole if whole else 1.0
    return LowRank(A.float().contiguous(), B.float().contiguous(), min(1.0, energy))


def _full(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, S, V


def _leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A few more than ``r`` leading singular vectors and values of a large ``matrix``."""
    tall = matrix.shape[0] >= matrix.shape[1]
    M = matrix if tall else matrix.T
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(M.shape[1], r + SPARE, generator=generator, dtype=torch.float32).to(M)
    captured = 0.0
    for _ in range(ROUNDS):
        P = torch.linalg.qr(M @ torch.linalg.qr(Q).Q).Q
        Q = M.T @ P
        before, captured = captured, float(torch.linalg.svdvals(Q)[:r].double().square().sum())
        if captured - before <= GROWTH * captured:
            break
    V, S, W = torch.linalg.svd(Q, full_matrices=False)  # P^T M = (V S W)^T
    U = P @ W.T
    return (U, S, V.T) if tall else (V, S, U.T)
