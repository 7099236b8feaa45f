"""Singular values and directions of ``delta = B A`` from matrices of r x r, in fp64; delta is not built.

:func:`singular_values` is precise for small values too: by QR of B and of A^T, and the SVD of ``R_B R_A^T``.
:class:`Core` takes one kernel for each Gram matrix and decomposes those of all layers together on the CPU, so that it
is cheap on a GPU; the squares in a Gram matrix leave values below 1e-8 of the largest to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.low_rank import DeltaFactors

NEGLIGIBLE = 1e-6  # of the largest singular value: a smaller one of a product of fp32 matrices is rounding


def singular_values(factors: DeltaFactors) -> Tensor:
    """The singular values of delta, ``(..., min(out_features, in_features, r))``, the largest first.

    Args:
        factors: ``scale * B`` of shape ``(..., out_features, r)`` and A of shape ``(..., r, in_features)``, in fp64.

    Example:
        >>> singular_values((torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0]]))).tolist()
        [5.0]
    """
    B, A = factors
    core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
    finite = _is_finite(core)
    values: Tensor = torch.linalg.svdvals(core.where(finite[..., None], 0))
    return values.where(finite, torch.nan)


def _is_finite(matrices: Tensor) -> Tensor:
    """Whether each matrix has no NaN and no infinity, which LAPACK refuses; of shape ``(..., 1)``."""
    return matrices.isfinite().flatten(-2).all(-1, keepdim=True)


def directions(matrix: Tensor) -> Tensor:
    """The left singular directions of ``matrix``, as columns; those without a singular value are NaN.

    Args:
        matrix: ``(..., features, r)``, B or the transpose of A.

    Returns:
        ``(..., features, min(features, r))``.
    """
    finite = _is_finite(matrix)
    U, S, _ = torch.linalg.svd(matrix.where(finite[..., None], 0), full_matrices=False)
    unique: Tensor = U.where(_kept(S)[..., None, :] & finite[..., None], torch.nan)
    return unique


def _kept(S: Tensor) -> Tensor:
    """Which singular values are more than rounding."""
    return (S[..., :1] * NEGLIGIBLE).lt(S)


class Core(NamedTuple):
    """The SVD ``U S V^T`` of many deltas, with the r x r matrices that make U of B and V of A^T.

    Args:
        S: singular values, ``(matrices, r)``, the largest first.
        left: ``(matrices, r, r)``; ``U = B @ left``, zero where a singular value is negligible.
        right: ``(matrices, r, r)``; ``V = A^T @ right``, in the same way.
    """

    S: Tensor
    left: Tensor
    right: Tensor

    def directions(self) -> Tensor:
        """How many directions each delta has, ``(matrices,)``."""
        return _kept(self.S).sum(-1)


def grams(factors: DeltaFactors, r: int) -> Tensor:
    """``B^T B`` and ``A A^T``, filled with zeros to a rank of ``r``: ``(2, matrices, r, r)``."""
    B, A = factors
    both = torch.stack([B.mT @ B, A @ A.mT])
    missing = r - both.shape[-1]
    return F.pad(both.reshape(2, -1, *both.shape[-2:]), (0, missing, 0, missing))


def core_of(stacked: Sequence[Tensor]) -> Core:
    """The decompositions of the deltas with these :func:`grams`, on the CPU.

    With a root ``R^T R = B^T B``, the squares of the singular values of ``B A`` are the eigenvalues of ``R A A^T R^T``.
    For its eigenvectors X it is ``V = A^T B^T U / S = A^T R^T X / S``, and ``U = B A V / S``.
    """
    both = torch.cat([each.to(stacked[0].device) for each in stacked], 1).cpu()
    finite = both.isfinite().flatten(-2).all(-1).all(0)
    of_B, of_A = both.where(finite[:, None, None], 0)
    values, vectors = torch.linalg.eigh(of_B)
    root = values.clamp(min=0).sqrt()[..., None] * vectors.mT
    squares, X = torch.linalg.eigh(root @ of_A @ root.mT)
    S, X = squares.clamp(min=0).sqrt().flip(-1), X.flip(-1)
    inverse = (1 / S).where(_kept(S), 0)[:, None, :]
    right = root.mT @ X * inverse
    return Core(S.where(finite[:, None], torch.nan), of_A @ right * inverse, right)
