"""``W0 + scale * B A`` of several layers, in a few launches for all of them.

Launching a kernel takes the host longer than a GPU needs for one small matrix. So the low-rank terms of
weights of one shape are one batched product, and backward turns the gradients of the weights into those of A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.weight_batch import WeightBatch


class WeightSums:
    """The sums ``W0 + scale * B A`` of several layers, and how their gradients become those of A and B.

    The product is computed in the dtype of the weights; the sum is rounded to that dtype once, then to ``dtype``.

    Args:
        weights: W0 of each layer, of two or more dimensions and one dtype.
        kinds: the indices of layers with weights of one shape, strides and rank, for each such kind.
        scale: factor of the product.
        dtype: of the sums: that of autocast, or of the weights.

    Attributes:
        values: the sums, of the shape of the weights.
    """

    values: Sequence[Tensor] = ()

    def __init__(self, weights: list[Tensor], kinds: list[list[int]], scale: float, dtype: torch.dtype) -> None:
        self.weights, self.kinds, self.scale, self.dtype = weights, kinds, scale, dtype
        self.batches: list[WeightBatch] = []

    def compute(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        """Compute :attr:`values`, in a place without gradients.

        Args:
            lefts: B of each layer, ``(rows, r)``; with ``rights`` it multiplies to a matrix of the weight's elements.
            rights: A of each layer, ``(r, columns)``.
        """
        device = self.weights[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                self._compute(lefts, rights)
        else:
            self._compute(lefts, rights)

    def _compute(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        values: dict[int, Tensor] = {}
        for kind in self.kinds:
            weights, left, right = ([tensors[i] for i in kind] for tensors in (self.weights, lefts, rights))
            batch = WeightBatch(weights, left, right, self.scale)
            self.batches.append(batch)
            values.update(zip(kind, batch.sums(), strict=True))
        self.values = [values[i].to(self.dtype) for i in range(len(self.weights))]


class SummedWeights(torch.autograd.Function):
    """Gives the sums their graph: the gradients of the weights become those of A and B.

    The node keeps no tensor by ``save_for_backward``, so several backward passes may go through it: of two losses, of
    two forward passes that read the same sums.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: WeightSums, indices: Sequence[int], done: Callable[[], object], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """Left, then right factors of the layers ``indices`` to their sums, which are computed here if they are not."""
        if not sums.values:
            sums.compute(factors[: len(indices)], factors[len(indices) :])
            values = tuple(sums.values)
        else:
            values = tuple(sums.values[index].detach() for index in indices)
        ctx.batches, ctx.kinds, ctx.scale = sums.batches, sums.kinds, sums.scale
        ctx.indices, ctx.done = indices, done
        ctx.factors, ctx.versions = factors, [factor._version for factor in factors]
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient
        return values

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradient of each factor, in its own dtype; ``None`` for those of a layer without a gradient."""
        given = [(position, gradient) for position, gradient in enumerate(gradients) if gradient is not None]
        count = len(gradients)
        results: list[Tensor | None] = [None] * (2 * count)
        if torch.is_grad_enabled():  # this backward is differentiated again
            for factor, version in zip(ctx.factors, ctx.versions, strict=True):
                check_unmodified(factor, version)
            for i, gradient in given:
                results[i], results[count + i] = _differentiable(
                    gradient, ctx.factors[i], ctx.factors[count + i], ctx.scale
                )
        else:
            positions = {index: position for position, index in enumerate(ctx.indices)}
            of_sums = {ctx.indices[position]: gradient for position, gradient in given}
            for index, d_left, d_right in gradients_of(ctx.kinds, ctx.batches, of_sums, ctx.factors[0].dtype):
                results[positions[index]], results[count + positions[index]] = d_left, d_right
        ctx.done()
        return None, None, None, *results


def gradients_of(
    kinds: Sequence[list[int]], batches: Sequence[WeightBatch], of_sums: Mapping[int, Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each layer with a gradient: its index, and the gradients of the left and of the right factor."""
    for kind, batch in zip(kinds, batches, strict=True):
        used = [position for position, i in enumerate(kind) if i in of_sums]
        if used:
            indices = [kind[position] for position in used]
            d_left, d_right = batch.gradients(used, [of_sums[i] for i in indices], dtype)
            yield from zip(indices, d_left.unbind(0), d_right.unbind(0), strict=True)


def _differentiable(gradient: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    matrix = scale * gradient.reshape(left.shape[0], right.shape[1])
    d_left = matrix @ right.to(matrix.dtype).mT
    return d_left.to(left.dtype), (left.to(matrix.dtype).mT @ matrix).to(right.dtype)


def with_graph(
    sums: WeightSums,
    indices: Sequence[int],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    done: Callable[[], object] = lambda: None,
) -> tuple[Tensor, ...]:
    """The sums of the layers ``indices``, differentiable by their factors.

    Args:
        sums: of all layers; if they are not computed yet, ``indices`` must be all of them.
        indices: which layers.
        lefts: the left factor of each.
        rights: the right factor of each.
        done: called when a backward pass was through.
    """
    outputs: tuple[Tensor, ...] = SummedWeights.apply(sums, indices, done, *lefts, *rights)  # type: ignore[no-untyped-call]
    return outputs
