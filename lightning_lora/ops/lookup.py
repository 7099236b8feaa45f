"""Columns of A by index, the ``A x`` of an embedding, where ``x`` is the one-hot vector of the index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import MAX_R, can_use_kernels
from lightning_lora.torch_internals import apply_of

MAX_INDICES = 2**14  # the kernel compares each index with every other one


class Columns(torch.autograd.Function):
    """``A[:, index]``, transposed; the gradient of A is dense, and zero in all other columns."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, index: Tensor, dtype: torch.dtype, padding: int, by_frequency: bool) -> Tensor:
        """``(r, num_embeddings)`` to ``(n, r)`` in ``dtype``; a column at ``padding`` gets no gradient."""
        ctx.save_for_backward(index)
        ctx.constants = A.size(1), A.dtype, padding, by_frequency
        return A.index_select(1, index).t().to(dtype=dtype)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> Any:
        """The gradient of A, in its own dtype."""
        (index,), (columns, dtype, padding, by_frequency) = ctx.saved_tensors, ctx.constants
        n, r = d_hidden.shape
        if n <= MAX_INDICES and r <= MAX_R and can_use_kernels(d_hidden):
            from lightning_lora.ops import lookup_kernels

            dA = lookup_kernels.column_gradient(d_hidden, index, columns, padding, by_frequency, dtype)
        else:
            of_rows = torch.ops.aten.embedding_dense_backward
            dA = of_rows(d_hidden.to(dtype=dtype), index, columns, padding, by_frequency).t()
        return dA, None, None, None, None


_apply = apply_of(Columns)


def columns_of(A: Tensor, index: Tensor, dtype: torch.dtype, padding_idx: int | None, by_frequency: bool) -> Tensor:
    """The output of :class:`Columns`.

    Args:
        A: ``(r, num_embeddings)``.
        index: ``(n,)``.
        dtype: of the result.
        padding_idx: the column that gets no gradient.
        by_frequency: whether the gradient of a column is divided by how often it is in ``index``.
    """
    hidden: Tensor = _apply(A, index, dtype, -1 if padding_idx is None else padding_idx, by_frequency)
    return hidden
