"""``W0 + scale * B A`` of several layers, in a few launches for all of them.

Launching a kernel takes the host longer than a GPU needs for one small matrix. So all sums are one launch of a Triton
kernel (:mod:`lightning_lora.ops.sums.plan`), or a batched product for the weights of each shape
(:mod:`lightning_lora.ops.sums.batch`). Backward turns the gradients of the weights into those of A and B likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.sums.batch import Block, WeightBatch
from lightning_lora.torch_internals import apply_of

if TYPE_CHECKING:
    from lightning_lora.ops.sums.plan import SumPlan

Triple = tuple[int, Tensor, Tensor]  # index of a block, the gradient of B, that of A
FactorGradients = Callable[[Mapping[int, Tensor]], Iterator[Triple]]  # from the gradients of some sums, by index


class WeightSums:
    """The sums of several layers, without a graph, in the dtype ``dtype``.

    Args:
        blocks: the rows that each pair (A, B) adapts, in the order of the weights; those of one weight have no row in
            common.
        lefts: B of each block, ``(rows, r)``; with ``rights`` it multiplies to a matrix of the block's elements.
        rights: A of each block, ``(r, columns)``.
        scale: factor of ``B A``.
        dtype: of the sums: that of autocast, or of the weights.

    Attributes:
        values: ``W0 + scale * B A`` of each layer, of the shape of its weight, once they are computed.
        gradients: turns gradients of the values into those of the factors; it holds none of the values.
    """

    values: Sequence[Tensor] = ()
    gradients: FactorGradients

    def __init__(
        self,
        blocks: Sequence[Block],
        lefts: tuple[Tensor, ...],
        rights: tuple[Tensor, ...],
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.blocks, self.lefts, self.rights, self.scale, self.dtype = blocks, lefts, rights, scale, dtype

    def compute(self) -> Sequence[Tensor]:
        """Compute the values; gradients must be disabled."""
        raise NotImplementedError


class BatchedSums(WeightSums):
    """The sums, by one batch for each kind of block: computed in the dtype of the weights, then cast.

    Args:
        weights: W0 of each layer, of two or more dimensions and one dtype.
        kinds: the indices of the blocks of one shape, strides and rank, for each such kind; the blocks of a kind are
            all whole weights, or all parts of weights.
        arguments: of :class:`WeightSums`.

    Example:
        >>> B, A = (torch.ones(2, 1),), (torch.ones(1, 2),)
        >>> sums = BatchedSums([torch.eye(2)], [[0]], [Block(0, 0, 2)], B, A, 0.5, torch.float32)
        >>> sums.compute()[0]
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """

    def __init__(self, weights: list[Tensor], kinds: list[list[int]], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weights, self.kinds = weights, kinds

    def compute(self) -> Sequence[Tensor]:
        """Compute the values; autocast would cast the products."""
        device = self.weights[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._compute()
        return self._compute()

    def _compute(self) -> Sequence[Tensor]:
        values: dict[int, Tensor] = {}
        batches: list[WeightBatch] = []
        for kind in self.kinds:
            blocks, lefts, rights = [self.blocks[i] for i in kind], *self._factors(kind)
            batch = WeightBatch([block.of(self.weights[block.weight]) for block in blocks], lefts, rights, self.scale)
            batches.append(batch)
            self._add(batch, blocks, values)
        self.gradients = partial(_batched_gradients, self.kinds, self.blocks, batches, self.lefts[0].dtype)
        self.values = [values[i] for i in range(len(self.weights))]
        if self.dtype != self.weights[0].dtype:
            self.values = [value.to(self.dtype) for value in self.values]
        return self.values

    def _factors(self, kind: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.lefts[i] for i in kind], [self.rights[i] for i in kind]

    def _add(self, batch: WeightBatch, blocks: list[Block], values: dict[int, Tensor]) -> None:
        """Put the sums of ``batch`` into ``values``, each in its rows of the weight's copy."""
        if blocks[0].is_whole(self.weights[blocks[0].weight]):
            values.update(zip([block.weight for block in blocks], batch.sums(), strict=True))
            return
        for index in {block.weight for block in blocks} - values.keys():
            values[index] = self.weights[index].clone()
        batch.add_to([block.of(values[block.weight]) for block in blocks])


def _batched_gradients(
    kinds: list[list[int]],
    blocks: Sequence[Block],
    batches: list[WeightBatch],
    dtype: torch.dtype,
    of_sums: Mapping[int, Tensor],
) -> Iterator[Triple]:
    for kind, batch in zip(kinds, batches, strict=True):
        used, indices, gradients = [], [], []
        for position, i in enumerate(kind):
            block = blocks[i]
            gradient = of_sums.get(block.weight)
            if gradient is not None:
                used.append(position)
                indices.append(i)
                gradients.append(block.of(gradient))
        if used:
            d_left, d_right = batch.gradients(used, gradients, dtype)
            yield from zip(indices, d_left.unbind(0), d_right.unbind(0), strict=True)


class PlannedSums(WeightSums):
    """The sums by the kernels of a plan, computed in fp32 and rounded once.

    Args:
        plan: of these layers.
        arguments: of :class:`WeightSums`.
    """

    def __init__(self, plan: SumPlan, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.plan = plan

    def compute(self) -> Sequence[Tensor]:
        """Compute the values in one launch."""
        versions = [factor._version for factor in self.lefts + self.rights]
        of_factors = self.blocks, self.lefts, self.rights, versions
        self.gradients = partial(_planned_gradients, self.plan, *of_factors, self.scale)
        self.values = self.plan.sums(self.scale, self.dtype)
        return self.values


def _planned_gradients(
    plan: SumPlan,
    blocks: Sequence[Block],
    lefts: tuple[Tensor, ...],
    rights: tuple[Tensor, ...],
    versions: list[int],
    scale: float,
    of_sums: Mapping[int, Tensor],
) -> Iterator[Triple]:
    """As :func:`_batched_gradients`; the kernels read A and B themselves, which no step may have changed."""
    used = [i for i, block in enumerate(blocks) if block.weight in of_sums]
    _check_unmodified(lefts + rights, versions, used)
    d_lefts, d_rights = plan.gradients(list(map(of_sums.get, range(blocks[-1].weight + 1))), lefts, rights, scale)
    for i in used:
        yield i, d_lefts[i], d_rights[i]  # type: ignore[misc]


def _check_unmodified(factors: Sequence[Tensor], versions: Sequence[int], used: Iterable[int]) -> None:
    """Raise if a factor of the blocks at ``used`` was changed. Other factors may have changed."""
    for at in used:
        for position in (at, at + len(factors) // 2):
            check_unmodified(factors[position], versions[position])


class SummedWeights(torch.autograd.Function):
    """Gives the sums their graph: the gradients of the weights become those of A and B.

    The node keeps no tensor by ``save_for_backward``, so several backward passes may go through it: of two losses, of
    two forward passes that read the same sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: WeightSums,
        indices: Sequence[int],
        blocks: Sequence[int],
        done: Callable[[], object],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Left, then right factors of ``blocks`` to the sums of the weights ``indices``."""
        values = [sums.values[index].detach() for index in indices] if sums.values else sums.compute()
        ctx.gradients, ctx.scale, ctx.indices, ctx.done = sums.gradients, sums.scale, indices, done
        ctx.blocks, ctx.positions = sums.blocks, {index: at for at, index in enumerate(blocks)}
        ctx.factors, ctx.versions = factors, [factor._version for factor in factors]
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient
        return tuple(values)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradient of each factor, in its own dtype; ``None`` for those of a layer without a gradient."""
        of_sums = {i: gradient for i, gradient in zip(ctx.indices, gradients, strict=True) if gradient is not None}
        positions, count = ctx.positions, len(ctx.positions)
        results: list[Tensor | None] = [None] * (2 * count)
        triples = _differentiable(ctx, of_sums) if torch.is_grad_enabled() else ctx.gradients(of_sums)
        for index, d_left, d_right in triples if of_sums else ():
            at = positions[index]
            results[at], results[count + at] = d_left, d_right
        ctx.done()
        return None, None, None, None, *results


def _differentiable(ctx: Any, of_sums: Mapping[int, Tensor]) -> Iterator[Triple]:
    """The gradients by operations that can be differentiated again."""
    lefts, rights = ctx.factors[: len(ctx.positions)], ctx.factors[len(ctx.positions) :]
    used = {index: at for index, at in ctx.positions.items() if ctx.blocks[index].weight in of_sums}
    _check_unmodified(ctx.factors, ctx.versions, used.values())
    for index, at in used.items():
        block, left, right = ctx.blocks[index], lefts[at], rights[at]
        matrix = ctx.scale * block.of(of_sums[block.weight]).reshape(left.shape[0], right.shape[1])
        d_left, d_right = matrix @ right.to(matrix.dtype).mT, left.to(matrix.dtype).mT @ matrix
        yield index, d_left.to(left.dtype), d_right.to(right.dtype)


class Rescaled(torch.autograd.Function):
    """``ratio * factor``, whose node saves no tensor either: several backward passes go through it as well."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, ratio: float) -> Tensor:
        """The product."""
        ctx.ratio = ratio
        return ratio * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient of the factor."""
        return ctx.ratio * gradient, None


def rescaled(factor: Tensor, ratio: float) -> Tensor:
    """``ratio * factor``, as a factor of sums with a graph."""
    product: Tensor = Rescaled.apply(factor, ratio)  # type: ignore[no-untyped-call]
    return product


def with_graph(
    sums: WeightSums,
    indices: Sequence[int],
    blocks: Sequence[int],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    done: Callable[[], object] = lambda: None,
) -> tuple[Tensor, ...]:
    """The sums of the weights ``indices``, differentiable by their factors.

    Args:
        sums: of all weights; if they are not computed yet, ``indices`` must be all of them.
        indices: which of them.
        blocks: the indices of their blocks.
        lefts: the left factor of each of these.
        rights: the right factor of each.
        done: called at the end of each backward pass through the node.
    """
    outputs: tuple[Tensor, ...] = apply_of(SummedWeights)(sums, indices, blocks, done, *lefts, *rights)
    return outputs
