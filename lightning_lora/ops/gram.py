"""Norms of ``delta = B A``, its angle with another and their distance, without building delta.

``||B A||^2 = tr(A^T B^T B A) = <B^T B, A A^T>``: two Gram matrices of r x r, whatever the size of the layer.
"""

from __future__ import annotations

import math

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
