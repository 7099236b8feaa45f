"""``W0 + scale * B A`` of several layers of one shape, in a few launches for all of them.

Launching a kernel takes the host longer than a GPU needs for one small matrix. So the low-rank terms are one batched
product, and backward turns the gradients of the weights into those of A and B by two more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.products import batched_matmul


class WeightSums:
    """The sums ``W0 + scale * B A`` of n layers with weights of one shape, and what they are made of.

    The product is computed in the dtype of the weights; the sum is rounded to that dtype once, then to ``dtype``.

    Args:
        weights: W0 of each layer, of two or more dimensions.
        scale: factor of the product.
        dtype: of the sums: that of autocast, or of the weights.

    Attributes:
        values: the sums, of the shape of the weights.
        left: scale * B of all, ``(n, rows, r)``, in the dtype of the weights.
        right: A of all, ``(n, r, columns)``, with the columns in the order in which the weights store them.
        order: the dimensions of the weights in that order, see :func:`stored_order`.
    """

    values: Sequence[Tensor] = ()
    left: Tensor
    right: Tensor

    def __init__(self, weights: list[Tensor], scale: float, dtype: torch.dtype) -> None:
        self.weights, self.scale, self.dtype, self.order = weights, scale, dtype, stored_order(weights[0])

    def compute(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compute the sums, in a place without gradients.

        Args:
            lefts: B of each layer, ``(rows, r)``; with ``rights`` it multiplies to a matrix of the weight's elements.
            rights: A of each layer, ``(r, columns)``.

        Example:
            >>> sums = WeightSums([torch.eye(2)], 0.5, torch.float32)
            >>> sums.compute([torch.ones(2, 1)], [torch.ones(1, 2)])[0]
            tensor([[1.5000, 0.5000],
                    [0.5000, 1.5000]])
        """
        device = self.weights[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.compute(lefts, rights)
        shape, dtype = self.weights[0].shape, self.weights[0].dtype
        left = torch.stack(lefts)  # type: ignore[arg-type]
        self.left = (left if self.scale == 1 else left * self.scale).to(dtype)
        self.right = _reordered(torch.stack(rights).to(dtype), shape, self.order)  # type: ignore[arg-type]
        deltas = _as_weights(torch.bmm(self.left, self.right), shape, self.order).unbind(0)
        values: Sequence[Tensor] = torch._foreach_add(self.weights, deltas)
        self.values = values if self.dtype == dtype else [value.to(self.dtype) for value in values]
        return self.values

    def only(self, index: int) -> WeightSums:
        """The sum of one of the layers."""
        part = slice(index, index + 1)
        one = WeightSums(self.weights[part], self.scale, self.dtype)
        one.left, one.right, one.values = self.left[part], self.right[part], [self.values[index].detach()]
        return one


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


def _as_weights(products: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """``(n, rows, columns)`` as n weights of ``shape`` that are stored in ``order``."""
    stored = products.view(len(products), *(shape[dimension] for dimension in order))
    return stored.permute(0, *(order.index(dimension) + 1 for dimension in range(len(shape))))


def _as_matrix(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """A gradient of a weight as a matrix whose columns have ``order``; a view, if it is stored so."""
    return weight if weight.dim() == 2 else weight.permute(order).flatten(1)


class SummedWeights(torch.autograd.Function):
    """Gives the sums their graph: the gradients of the weights become those of A and B.

    The node keeps no tensor by ``save_for_backward``, so several backward passes may go through it: of two losses, of
    two forward passes that read the same sums.
    """

    @staticmethod
    def forward(ctx: Any, sums: WeightSums, done: Callable[[], object], *factors: Tensor) -> tuple[Tensor, ...]:
        """Left and right factors of all layers, as :meth:`WeightSums.compute` takes them, to the sums."""
        half = len(factors) // 2
        values = tuple(sums.values or sums.compute(factors[:half], factors[half:]))
        ctx.left, ctx.right, ctx.scale, ctx.order, ctx.done = sums.left, sums.right, sums.scale, sums.order, done
        ctx.factors, ctx.versions = factors, [factor._version for factor in factors]
        ctx.shape = values[0].shape
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient
        return values

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradient of each factor, in its own dtype; ``None`` for those of a layer without a gradient."""
        used: list[int] = [index for index, gradient in enumerate(gradients) if gradient is not None]
        lefts, rights = ctx.factors[: len(gradients)], ctx.factors[len(gradients) :]
        d_lefts: list[Tensor | None] = [None] * len(gradients)
        d_rights: list[Tensor | None] = [None] * len(gradients)
        if torch.is_grad_enabled():  # this backward is differentiated again
            for factor, version in zip(ctx.factors, ctx.versions, strict=True):
                check_unmodified(factor, version)
            for i in used:
                d_lefts[i], d_rights[i] = _differentiable(gradients[i], lefts[i], rights[i], ctx.scale)
        elif used:
            left, right = (ctx.left, ctx.right) if len(used) == len(lefts) else (ctx.left[used], ctx.right[used])
            matrices = [_as_matrix(gradients[i], ctx.order) for i in used]  # type: ignore[arg-type]
            d_left, d_right = _batched(matrices, left, right, ctx.scale, lefts[0].dtype)
            d_right = _reordered_back(d_right, ctx.shape, ctx.order)
            for i, of_left, of_right in zip(used, d_left.unbind(0), d_right.unbind(0), strict=True):
                d_lefts[i], d_rights[i] = of_left, of_right
        ctx.done()
        return None, None, *d_lefts, *d_rights


def _batched(
    gradients: list[Tensor], left: Tensor, right: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of the left factors, ``(n, rows, r)``, and of the right ones, ``(n, r, columns)``."""
    stacked = torch.stack(gradients)
    left, right = left.to(stacked.dtype), right.to(stacked.dtype)
    d_left = batched_matmul(stacked, right.mT, dtype)
    if scale != 1:
        d_left *= scale
    return d_left, batched_matmul(left.mT, stacked, dtype)


def _differentiable(gradient: Any, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    matrix = scale * gradient.reshape(left.shape[0], right.shape[1])
    d_left = matrix @ right.to(matrix.dtype).mT
    return d_left.to(left.dtype), (left.to(matrix.dtype).mT @ matrix).to(right.dtype)


def with_graph(
    sums: WeightSums, lefts: Sequence[Tensor], rights: Sequence[Tensor], done: Callable[[], object]
) -> tuple[Tensor, ...]:
    """The values of ``sums``, differentiable by the factors; ``done`` is called when a backward pass was through."""
    outputs: tuple[Tensor, ...] = SummedWeights.apply(sums, done, *lefts, *rights)  # type: ignore[no-untyped-call]
    return outputs
