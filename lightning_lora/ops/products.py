"""Matrix products that the fused ops share, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.packed.weight import Weight, matrix_of, product_of
from lightning_lora.torch_internals import in_functorch_transform

HALF_DTYPES = (torch.bfloat16, torch.float16)


def as_matrix(x: Tensor) -> Tensor:
    """``x`` of shape ``(..., features)`` as ``(n, features)``."""
    return x if x.dim() == 2 else x.reshape(-1, x.size(-1))


def like(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` of shape ``(n, features)`` in the shape of ``x``, ``(..., features)``."""
    return rows if x.dim() == 2 else rows.view(*x.shape)


def base_plus_low_rank(x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor, B: Tensor) -> Tensor:
    """``W0 x + b + B h``: the second product accumulates onto the first.

    With a bias the base output comes first: cuBLAS rounds the addition of a bias differently, and while B is zero the
    result must be the base output. Without one the low-rank term comes first. So it does not where another library
    computes the base output.

    Args:
        x: ``(..., in_features)``.
        weight: W0, ``(out_features, in_features)``.
        bias: ``(out_features,)``.
        hidden: ``scale * A x``, ``(..., r)``.
        B: in the dtype of ``x``, ``(out_features, r)``.

    Returns:
        ``(..., out_features)``, not a view: one that a node of autograd returns could not be modified in place.
    """
    base = product_of(weight, x)
    if bias is None and base is None:
        y = F.linear(hidden, B)
        as_matrix(y).addmm_(as_matrix(x), matrix_of(weight).t())
        return y
    # Of three dimensions, torch returns a view of its product.
    y = (F.linear(x, matrix_of(weight), bias) if base is None else base).data
    as_matrix(y).addmm_(as_matrix(hidden), B.t())
    return y


def scaled(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * matrix`` in ``dtype``, rounded once; ``matrix`` itself if nothing changes."""
    if scale == 1:
        return matrix.to(dtype=dtype)
    if dtype == matrix.dtype or torch.is_grad_enabled():
        return (scale * matrix).to(dtype=dtype)
    return torch.mul(matrix, scale, out=torch.empty_like(matrix, dtype=dtype))


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``, of two matrices or two batches of them.

    cuBLAS writes fp32 from half inputs without rounding to their dtype first.
    """
    product = torch.mm if left.dim() == 2 else torch.bmm
    to_fp32 = left.is_cuda and dtype == torch.float32 and left.dtype in HALF_DTYPES and torch.version.hip is None
    if to_fp32 and not torch.is_grad_enabled() and not in_functorch_transform():
        return product(left, right, out_dtype=dtype)
    return product(left, right).to(dtype=dtype)


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two parts of the gradient of ``x``, those of W0 and of A, then the gradients of A and B.

    Autograd can record these products, and ``torch.func`` batch them.
    """
    cast_A, cast_B, rows, dy_rows = (scale * A).to(x.dtype), B.to(x.dtype), as_matrix(x), as_matrix(dy)
    d_hidden = dy_rows @ cast_B
    dA, dB = scale * (d_hidden.t() @ rows).to(A.dtype), (dy_rows.t() @ (rows @ cast_A.t())).to(B.dtype)
    return like(dy_rows @ weight, x), like(d_hidden @ cast_A, x), dA, dB
