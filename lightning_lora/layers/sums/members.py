"""The members of a group of sums: what the group asks of each, and all that are summed together."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Protocol

from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_view import Rows
from lightning_lora.ops.sums.batch import Block
from lightning_lora.torch_internals import count_of_hooks, has_module_hooks

ADDRESS, VERSION, REQUIRES_GRAD = Tensor.data_ptr, attrgetter("_version"), attrgetter("requires_grad")
SIZE, LAYOUT = attrgetter("nbytes"), attrgetter("shape", "dtype")


class Member(Protocol):
    """What the group asks of a :class:`lightning_lora.layers.sums.summed_weight.SummedWeight`."""

    value: Tensor | None
    was_read: bool
    index: int
    blocks: range
    facts: Sequence[object]
    has_watched_factors: bool
    pairs: Sequence[Adapter]
    sources: Sequence[tuple[dict[str, Any], str]]
    separate: Sequence[Rows | None]
    input_rows: int
    layer: weakref.ref[LoRALayer]

    def is_live(self, layer: LoRALayer | None) -> bool:
        """Whether ``layer`` computes with it now."""

    def is_wanted(self, rows: int, growth: float) -> bool:
        """Whether its layer is expected to read it in this forward pass."""

    def can_be_summed(self, first: Any) -> bool:
        """Whether it can be summed together with the weight ``first``."""

    def is_called_alone(self, grad: bool) -> bool:
        """Whether its weight trains, or a hook expects a call of its pairs."""

    def is_watched(self) -> bool:
        """Whether a hook waits for the gradient of A or B."""

    def rows(self, weight: Tensor) -> list[tuple[int, int]]:
        """The first row of each of its blocks, and the one after the last."""

    def factors_in_group(self, scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """Its factors for the graph of the group, as those of :meth:`factors`."""

    def facts_now(self) -> list[object]:
        """Versions, addresses and flags: any change of its tensors changes them."""

    def add_choice(self, names: frozenset[str]) -> None:
        """Have a sum in which the adapters ``names`` act."""


class SummedMembers:
    """Members that are summed together, as long as nothing but the values of their tensors changes.

    One that no longer acts, or has another scale, may be among them. It sees that itself when it is called, and lets
    the group look for its members again.

    Args:
        members: in their order in the group.
        grad: whether gradients are enabled.

    Attributes:
        scale: of the first pair that acts, which the sums multiply by: others are divided by it.
        weights: where W0 of each member is among the tensors.
        layout: what the plan of the sums is made of; memory that was freed may hold a tensor of another shape now.
        has_plain_factors: whether the factors are A and B themselves, of pairs with one scale.
    """

    def __init__(self, members: list[Member], grad: bool) -> None:
        self.references, self.grad = [weakref.ref(member) for member in members], grad
        tensors, self.hooks = tensors_of(members), count_of_hooks()
        self.included = set(map(id, members))
        self.ids, self.addresses = list(map(id, tensors)), list(map(ADDRESS, tensors))
        self.flags, self.sizes = list(map(REQUIRES_GRAD, tensors)), list(map(SIZE, tensors))
        self.scales = [pair.scale for member in members for pair in member.pairs]
        self.scale = next(filter(None, self.scales), 1.0)
        self.weights = [*accumulate((len(member.sources) for member in members), initial=0)][:-1]
        of_weights = set(self.weights)
        self.pairs = [at for at in range(len(tensors)) if at not in of_weights]  # A and B in turn
        block = 0
        for index, member in enumerate(members):
            member.index, member.has_watched_factors = index, grad and member.is_watched()
            member.blocks = range(block, block + (len(member.separate) or 1))
            block = member.blocks.stop
        strides, rows = list(map(Tensor.stride, tensors)), [member.separate for member in members]
        self.layout: list[object] = [self.addresses, list(map(LAYOUT, tensors)), strides, rows]
        self.is_watched = any(member.has_watched_factors for member in members)
        self.has_plain_factors = set(self.scales) == {self.scale} and all(member.separate for member in members)

    def members(self) -> list[Member]:
        """Those that exist."""
        return [member for reference in self.references if (member := reference()) is not None]

    def tensors_if_unchanged(self, caller: Member, grad: bool) -> list[Any] | None:
        """W0, and A and B of each pair, of all members; ``None`` if the members must be looked for again."""
        members = self.members()
        if grad is not self.grad or len(members) < len(self.references) or id(caller) not in self.included:
            return None
        tensors = tensors_of(members)
        if list(map(id, tensors)) != self.ids or list(map(ADDRESS, tensors)) != self.addresses:
            return None
        if list(map(SIZE, tensors)) != self.sizes:  # some of their rows or columns, by `.data`
            return None
        return None if self.is_watched or self._has_new_hooks(members) else tensors

    def _has_new_hooks(self, members: list[Member]) -> bool:
        """Whether a hook expects a call of a pair, or waits for the gradient of A or B, since these were looked for."""
        hooks = count_of_hooks()
        if hooks == self.hooks:
            return False
        for member in members:
            if any(map(has_module_hooks, member.pairs)) or (self.grad and member.is_watched()):
                return True
        self.hooks = hooks
        return False

    def factors(self, tensors: list[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The left and the right factor of each block."""
        if self.has_plain_factors and not self.is_watched:
            matrices = [tensors[at] for at in self.pairs]
            return tuple(matrices[1::2]), tuple(matrices[::2])
        factors = [member.factors_in_group(self.scale) for member in self.members()]
        lefts, rights = (tuple(chain.from_iterable(part)) for part in zip(*factors, strict=True))
        return lefts, rights

    def blocks(self, weights: list[Tensor]) -> list[Block]:
        """The rows of each pair."""
        members = enumerate(self.members())
        return [Block(index, *rows) for index, member in members for rows in member.rows(weights[index])]

    def hand_out(self, values: Sequence[Tensor], tensors: list[Any]) -> None:
        """Give each member its sum, and the facts by which it sees a later change."""
        facts = list(chain.from_iterable(zip(map(VERSION, tensors), self.addresses, self.flags, strict=True)))
        first = 0
        for at, member, value in zip(self.weights, self.members(), values, strict=True):
            last = first + len(member.pairs)
            member.facts = self.scales[first:last] + facts[3 * at : 3 * (at + len(member.sources))]
            member.value, first = value, last


def weight_of(member: Member) -> Any:
    """Its W0."""
    parameters, key = member.sources[0]
    return parameters[key]


def tensors_of(members: Sequence[Member]) -> list[Any]:
    """W0, and A and B of each pair, of each of ``members``."""
    return [parameters.get(key) for member in members for parameters, key in member.sources]
