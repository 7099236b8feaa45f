"""The products that :mod:`lightning_lora.ops.fused_linear` and its neighbours are made of, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.torch_internals import in_functorch_transform

HALVES = (torch.bfloat16, torch.float16)


def rows_of(x: Tensor) -> Tensor:
    """``x`` of shape ``(..., features)`` as ``(n, features)``."""
    return x.reshape(-1, x.shape[-1])


def both_terms(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> Tensor:
    """``W0 x + b + B h``, the frozen product accumulating onto the low-rank one.

    With a bias the frozen map comes first: cuBLAS adds a bias by another rounding, and while B is zero the output is
    the base's.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.
        hidden: ``scale * A x``, ``(n, r)``.
        up: B in the dtype of ``x``, ``(out_features, r)``.
    """
    y = x.new_empty(*x.shape[:-1], len(up))
    rows = rows_of(y)  # written through: a node that gives out a view of what it made takes no writes in place
    if bias is not None:
        torch.addmm(bias, rows_of(x), weight.t(), out=rows)
        rows.addmm_(hidden, up.t())
    else:
        torch.mm(hidden, up.t(), out=rows)
        rows.addmm_(rows_of(x), weight.t())
    return y


def sum_of_products(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """``total + one @ other``, in place unless somebody differentiates it in turn, or makes a batch of gradients."""
    if total is None:
        return torch.mm(one, other)
    if torch.is_grad_enabled() or in_functorch_transform():
        return torch.addmm(total, one, other)
    return total.addmm_(one, other)


def scaled(A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * A`` in ``dtype``, rounded once; by no kernel where it is that already."""
    if scale == 1:
        return A.to(dtype)
    if dtype == A.dtype or torch.is_grad_enabled():
        return (scale * A).to(dtype)
    return torch.mul(A, scale, out=torch.empty_like(A, dtype=dtype))


def product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """``one @ other`` in ``dtype``: not rounded to the inputs' own on the way, where cuBLAS can do without."""
    wide = dtype == torch.float32 and one.dtype in HALVES and one.is_cuda and torch.version.hip is None
    if wide and not torch.is_grad_enabled() and not in_functorch_transform():
        return torch.mm(one, other, out_dtype=dtype)
    return torch.mm(one, other).to(dtype)
