"""``W0 + scale * B A`` of blocks of rows of one shape: one batched product, and two more for the gradients.

A block is a whole weight, or some of its rows: query, key and value of an attention layer are rows of one weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.ops.products import matmul


class Block(NamedTuple):
    """Rows ``start:stop`` of the weight with the index ``weight``; one pair (A, B) adapts them.

    Example:
        >>> Block(0, 1, 3).of(torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([[2.],
                [3.]])
    """

    weight: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of ``tensor``, which has the shape of the weight: a view, or ``tensor`` if they are all."""
        return tensor if self.is_whole(tensor) else tensor[self.start : self.stop]

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether they are all rows of ``tensor``."""
        return self.stop - self.start == tensor.size(0)


class WeightBatch:
    """n blocks of one shape.

    Args:
        weights: W0 of each block, of two or more dimensions.
        lefts: B of each block, ``(rows, r)``; with ``rights`` it multiplies to a matrix of the weight's elements.
        rights: A of each block, ``(r, columns)``.
        scale: factor of the product.

    Example:
        >>> batch = WeightBatch([torch.eye(2)], [torch.ones(2, 1)], [torch.ones(1, 2)], 0.5)
        >>> batch.sums()[0]
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """

    def __init__(self, weights: list[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float) -> None:
        self.weights, self.scale, self.shape, self.order = weights, scale, weights[0].shape, stored_order(weights[0])
        left, right, dtype = torch.stack(lefts), torch.stack(rights), weights[0].dtype  # type: ignore[arg-type]
        self.left = (left if scale == 1 else left * scale).to(dtype)  # (n, rows, r)
        self.right = _reordered(right.to(dtype), self.shape, self.order)  # (n, r, columns)

    def sums(self) -> Sequence[Tensor]:
        """The sums, rounded to the dtype of the weights once."""
        sums: Sequence[Tensor] = torch._foreach_add(self.weights, self._deltas())
        first = self.weights[0]
        if sums[0].stride() != first.stride():  # of dimensions of size 1, from which cuDNN reads the memory format
            return [total.as_strided(first.shape, first.stride()) for total in sums]
        return sums

    def add_to(self, copies: list[Tensor]) -> None:
        """Add the products to ``copies``, which hold the values of the weights."""
        torch._foreach_add_(copies, self._deltas())

    def _deltas(self) -> tuple[Tensor, ...]:
        products, first = torch.bmm(self.left, self.right), self.weights[0]
        return products.as_strided((len(products), *first.shape), (first.numel(), *first.stride())).unbind(0)

    def gradients(self, used: list[int], gradients: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradients of the left factors, ``(n, rows, r)``, and of the right ones, ``(n, r, columns)``.

        Args:
            used: the blocks that have a gradient.
            gradients: of the weights of these blocks.
            dtype: of the result.
        """
        if len(self.order) > 2:  # with the columns as they are stored
            gradients = [gradient.permute(self.order).flatten(1) for gradient in gradients]
        stacked = torch.stack(gradients)
        is_full = len(used) == len(self.weights)
        left, right = (self.left, self.right) if is_full else (self.left[used], self.right[used])
        d_left = matmul(stacked, right.to(stacked.dtype).mT, dtype)
        if self.scale != 1:
            d_left *= self.scale
        d_right = matmul(left.to(stacked.dtype).mT, stacked, dtype)
        return d_left, _reordered_back(d_right, self.shape, self.order)


def stored_order(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of ``weight`` by descending stride: ``(0, 2, 3, 1)`` in the memory format ``channels_last``.

    Example:
        >>> stored_order(torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last))
        (0, 2, 3, 1)
    """
    inner = range(1, weight.dim())
    if weight.is_contiguous():
        return (0, *inner)
    return (0, *sorted(inner, key=lambda dimension: weight.stride(dimension), reverse=True))


def is_dense(weight: Tensor) -> bool:
    """Whether ``weight`` fills its memory without gaps, its rows one after the other."""
    return weight.is_contiguous() or weight.permute(stored_order(weight)).is_contiguous()


def _reordered(right: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """``(n, r, columns)`` with the columns of weights of ``shape`` in the order in which these are stored."""
    if list(order) == sorted(order):
        return right
    n, r, _ = right.shape
    return right.view(n, r, *shape[1:]).permute(0, 1, *(dimension + 1 for dimension in order[1:])).reshape(n, r, -1)


def _reordered_back(right: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """The reverse of :func:`_reordered`."""
    if list(order) == sorted(order):
        return right
    n, r, _ = right.shape
    stored = right.view(n, r, *(shape[dimension] for dimension in order[1:]))
    return stored.permute(0, 1, *(order.index(dimension) + 1 for dimension in range(1, len(shape)))).flatten(2)
