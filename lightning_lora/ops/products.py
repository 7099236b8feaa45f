"""Matrix products that the fused ops share, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.torch_internals import in_functorch_transform

HALF_DTYPES = (torch.bfloat16, torch.float16)


def as_matrix(x: Tensor) -> Tensor:
    """``x`` of shape ``(..., features)`` as ``(n, features)``."""
    return x.reshape(-1, x.shape[-1])


def base_plus_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, B: Tensor) -> Tensor:
    """``W0 x + b + B h``: the second product accumulates onto the first.

    With a bias the base output comes first: cuBLAS rounds the addition of a bias differently, and while B is zero the
    result must be the base output. Without one the low-rank term comes first.

    Args:
        x: ``(..., in_features)``.
        weight: W0, ``(out_features, in_features)``.
        bias: ``(out_features,)``.
        hidden: ``scale * A x``, ``(n, r)``.
        B: in the dtype of ``x``, ``(out_features, r)``.

    Returns:
        ``(..., out_features)``.
    """
    y = x.new_empty(*x.shape[:-1], len(B))
    rows = as_matrix(y)  # the products write into this view: returned itself, it could not be modified in place
    if bias is not None:
        torch.addmm(bias, as_matrix(x), weight.t(), out=rows)
        rows.addmm_(hidden, B.t())
    else:
        torch.mm(hidden, B.t(), out=rows)
        rows.addmm_(as_matrix(x), weight.t())
    return y


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right``, in place unless it is differentiated again or gradients are batched."""
    if total is None:
        return torch.mm(left, right)
    if torch.is_grad_enabled() or in_functorch_transform():
        return torch.addmm(total, left, right)
    return total.addmm_(left, right)


def scaled(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * matrix`` in ``dtype``, rounded once; ``matrix`` itself if nothing changes."""
    if scale == 1:
        return matrix.to(dtype)
    if dtype == matrix.dtype or torch.is_grad_enabled():
        return (scale * matrix).to(dtype)
    return torch.mul(matrix, scale, out=torch.empty_like(matrix, dtype=dtype))


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``; cuBLAS writes fp32 from half inputs without rounding to their dtype first."""
    to_fp32 = dtype == torch.float32 and left.dtype in HALF_DTYPES and left.is_cuda and torch.version.hip is None
    if to_fp32 and not torch.is_grad_enabled() and not in_functorch_transform():
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def batched_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`matmul` of a batch: ``(n, rows, k)`` and ``(n, k, columns)`` to ``(n, rows, columns)``."""
    if dtype == torch.float32 and left.dtype in HALF_DTYPES and left.is_cuda and torch.version.hip is None:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left, right).to(dtype)
