"""``W0 + scale * B A`` of layers with weights of one shape: one batched product, and two more for the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.ops.products import batched_matmul


class WeightBatch:
    """n layers with weights of one shape.

    Args:
        weights: W0 of each layer, of two or more dimensions.
        lefts: B of each layer, ``(rows, r)``; with ``rights`` it multiplies to a matrix of the weight's elements.
        rights: A of each layer, ``(r, columns)``.
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
        products, first = torch.bmm(self.left, self.right), self.weights[0]
        deltas = products.as_strided((len(products), *first.shape), (first.numel(), *first.stride())).unbind(0)
        sums: Sequence[Tensor] = torch._foreach_add(self.weights, deltas)
        if sums[0].stride() != first.stride():  # of dimensions of size 1, from which cuDNN reads the memory format
            return [total.as_strided(first.shape, first.stride()) for total in sums]
        return sums

    def gradients(self, used: list[int], gradients: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradients of the left factors, ``(n, rows, r)``, and of the right ones, ``(n, r, columns)``.

        Args:
            used: the layers that have a gradient.
            gradients: of the weights of these layers.
            dtype: of the result.
        """
        stacked = torch.stack([_as_matrix(gradient, self.order) for gradient in gradients])
        is_full = len(used) == len(self.weights)
        left, right = (self.left, self.right) if is_full else (self.left[used], self.right[used])
        d_left = batched_matmul(stacked, right.to(stacked.dtype).mT, dtype)
        if self.scale != 1:
            d_left *= self.scale
        d_right = batched_matmul(left.to(stacked.dtype).mT, stacked, dtype)
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
    return weight.permute(stored_order(weight)).is_contiguous()


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


def _as_matrix(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """A gradient of a weight as a matrix whose columns have ``order``; a view, if it is stored so."""
    return weight if weight.dim() == 2 else weight.permute(order).flatten(1)
