"""The best approximation of a matrix by one of rank r: its truncated SVD (Eckart and Young 1936).

Small matrices are decomposed in full, in fp64. Of large ones only the leading subspace is found, by subspace iteration
from more random vectors than needed (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), until what it
captures stops growing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
