"""``W0 x + scale * B A x`` of an embedding, where ``A x`` is a column of A, as one node of autograd on a GPU.

The low-rank term is accumulated onto the rows of W0. A term of its own would be written to memory, and both read again
to be added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops import fused_linear
from lightning_lora.ops.dispatch import MAX_R, can_use_kernels, check_unmodified, without_autocast
from lightning_lora.ops.products import as_matrix, matmul, scaled
from lightning_lora.torch_internals import apply_of, is_transformed, versions_of

MAX_INDICES = 2**14  # the kernel compares each index with every other one


def can_fuse_embedding(index: Tensor, weight: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FusedEmbedding` can be used: plain tensors on a GPU, computed eagerly."""
    return (
        weight is not None
        and weight.device.type in fused_linear.DEVICES
        and type(index) is Tensor
        and type(weight) in fused_linear.PLAIN
        and type(A) in fused_linear.PLAIN
        and type(B) in fused_linear.PLAIN
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


class FusedEmbedding(torch.autograd.Function):
    """The rows of W0 plus ``scale * B A[:, index]``, accumulated onto them. A is small, so its gradient is dense."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, constants: tuple[Tensor, Tensor, float, int, bool]) -> Tensor:
        """The sum, ``(..., embedding_dim)``.

        Args:
            ctx: the node.
            A: ``(r, num_embeddings)``.
            B: ``(embedding_dim, r)``.
            constants: W0; the index, ``(...)``; the scale; and for the gradient of A the padding index, -1 for none,
                and whether a column's is divided by how often its index occurs.
        """
        weight, index, scale, *arguments = constants
        y = torch.embedding(weight, index)
        index, dtype = index.reshape(-1), y.dtype
        hidden, cast_B = A.index_select(1, index).t().to(dtype=dtype), scaled(B, scale, dtype)  # (n, r)
        ctx.save_for_backward(index, hidden)
        ctx.constants = A, B, versions_of(A, B), cast_B, scale, arguments
        y.view(-1, y.size(-1)).addmm_(hidden, cast_B.t())
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of A and B, in their own dtype."""
        index, hidden = ctx.saved_tensors
        A, B, versions, cast_B, scale, arguments = ctx.constants
        again = torch.is_grad_enabled()  # this backward is differentiated again
        if again or cast_B is B:
            check_unmodified(B, versions[1])
        if again:
            check_unmodified(A, versions[0])
            cast_B, hidden = scaled(B, scale, dy.dtype), A.t()[index].to(dy.dtype)
        needs_dA, needs_dB, _ = ctx.needs_input_grad
        dy, dA, dB = as_matrix(dy), None, None
        if needs_dA:
            dA = gradient_of_columns(torch.mm(dy, cast_B), index, A, *arguments)
        if needs_dB:
            dB = scaled(matmul(dy.t(), hidden, B.dtype), scale, B.dtype)
        return dA, dB, None


def gradient_of_columns(d_hidden: Tensor, index: Tensor, A: Tensor, padding: int, by_frequency: bool) -> Tensor:
    """The gradient of A for ``d_hidden``, that of its columns, ``(n, r)``; columns without an index have zeros."""
    n, r = d_hidden.shape
    if 0 < n <= MAX_INDICES and r <= MAX_R and can_use_kernels(d_hidden):
        from lightning_lora.ops import embedding_kernels

        return embedding_kernels.column_gradient(d_hidden, index, A.size(1), padding, by_frequency, A.dtype)
    of_rows = torch.ops.aten.embedding_dense_backward(d_hidden.to(A.dtype), index, A.size(1), padding, by_frequency)
    return of_rows.t()  # type: ignore[no-any-return]


_apply = apply_of(FusedEmbedding)


def fused_embedding(
    index: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, padding_idx: int | None, by_frequency: bool
) -> Tensor:
    """The output of :class:`FusedEmbedding`."""
    padding = -1 if padding_idx is None else padding_idx
    y: Tensor = _apply(A, B, (weight, index, scale, padding, by_frequency))
    return y
