"""Layers that are summed together: when their sums are made, and when they are let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_view import Rows
from lightning_lora.ops.fused_linear import PLAIN
from lightning_lora.ops.weight_batch import Block
from lightning_lora.ops.weight_sum_plan import SumPlan
from lightning_lora.ops.weight_sums import BatchedSums, PlannedSums, WeightSums, with_graph
from lightning_lora.torch_internals import (
    any_autocast_enabled,
    call_after_backward,
    count_of_hooks,
    cuda_stream_id,
    has_module_hooks,
    is_capturing,
)

ADDRESS, VERSION, REQUIRES_GRAD = Tensor.data_ptr, attrgetter("_version"), attrgetter("requires_grad")


class Member(Protocol):
    """What the group asks of a :class:`lightning_lora.layers.summed_weight.SummedWeight`."""

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
        """What tells of a change."""

    def add_choice(self, names: frozenset[str]) -> None:
        """Have a sum in which the adapters ``names`` act."""


def place_now(weight: Tensor) -> tuple[object, ...]:
    """The dtype of a sum with ``weight``, the stream that computes it, and whether it is an inference tensor."""
    dtype = weight.dtype
    if any_autocast_enabled() and torch.is_autocast_enabled(weight.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(weight.device.type)
    return dtype, weight.is_cuda and cuda_stream_id(weight.device), torch.is_inference_mode_enabled()


class Lineup:
    """Members that are summed together, as long as nothing but the values of their tensors changes.

    One that no longer acts, or has another scale, may be among them. It sees that itself when it is called, and lets
    the group look for its members again.

    Args:
        members: in their order in the group.
        grad: whether gradients are enabled.

    Attributes:
        scale: of the first pair.
        weights: where W0 of each member is among the tensors.
        has_plain_factors: whether the factors are A and B themselves, of pairs with one scale.
    """

    def __init__(self, members: list[Member], grad: bool) -> None:
        self.references, self.grad = [weakref.ref(member) for member in members], grad
        tensors, self.hooks = _tensors_of(members), count_of_hooks()
        self.included = set(map(id, members))
        self.ids, self.addresses = list(map(id, tensors)), list(map(ADDRESS, tensors))
        self.flags = list(map(REQUIRES_GRAD, tensors))
        self.scales = [pair.scale for member in members for pair in member.pairs]
        self.scale = self.scales[0]
        self.weights = [*accumulate((len(member.sources) for member in members), initial=0)][:-1]
        of_weights = set(self.weights)
        self.pairs = [at for at in range(len(tensors)) if at not in of_weights]  # A and B in turn
        block = 0
        for index, member in enumerate(members):
            member.index, member.has_watched_factors = index, grad and member.is_watched()
            member.blocks = range(block, block + (len(member.separate) or 1))
            block = member.blocks.stop
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
        tensors = _tensors_of(members)
        if list(map(id, tensors)) != self.ids or list(map(ADDRESS, tensors)) != self.addresses:
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
        """Give each member its sum, and what tells of a change since."""
        versions, first = list(map(VERSION, tensors)), 0
        for at, member, value in zip(self.weights, self.members(), values, strict=True):
            end = at + len(member.sources)
            scales = self.scales[first : first + len(member.pairs)]
            member.facts = [*scales, *versions[at:end], *self.addresses[at:end], *self.flags[at:end]]
            member.value, first = value, first + len(member.pairs)


def _weight_of(member: Member) -> Any:
    parameters, key = member.sources[0]
    return parameters[key]


def _tensors_of(members: Sequence[Member]) -> list[Any]:
    return [parameters.get(key) for member in members for parameters, key in member.sources]


class SumGroup:
    """Layers that are summed together: neighbours in the model, with weights of one dtype."""

    def __init__(self) -> None:
        self.members: list[weakref.ref[Member]] = []  # a layer that leaves the model leaves its group
        self.of_choices: weakref.WeakValueDictionary[frozenset[str], SumGroup] = weakref.WeakValueDictionary()
        self.lineup: Lineup | None = None  # the members that were summed last
        self.times = 1  # that sums were made
        self.checked: list[object] = []  # the tensors for which `usable` was found, by their addresses
        self.usable: list[bool] = []  # whether each live member can be summed
        self.addresses: list[int] = []  # of the tensors that `blocks`, `kinds` and `plan` are of
        self.blocks: list[Block] = []
        self.kinds: list[list[int]] = []
        self.plan: SumPlan | None = None
        self._clear()

    def _clear(self) -> None:
        self.sums: WeightSums | None = None
        self.grad: bool | None = None
        self.place: tuple[object, ...] = ()
        self.is_forgotten_soon = False

    def alive(self) -> list[Member]:
        """The members whose layers exist."""
        return [member for reference in self.members if (member := reference()) is not None]

    def of_choice(self, names: frozenset[str]) -> SumGroup:
        """The group of the same layers whose sums have the adapters ``names`` in them."""
        group = self.of_choices.get(names)
        if group is None:
            group = self.of_choices[names] = SumGroup()
        return group

    def end_of_choice(self, names: frozenset[str]) -> None:
        """Free the sums of a choice that ends; those with a graph end with their backward pass."""
        group = self.of_choices.get(names)
        if group is not None and group.grad is False:
            group.forget()

    def sum(self, caller: Member, grad: bool, rows: int) -> None:
        """Sum the weights of all layers that are adapted now, and can be summed together with that of ``caller``.

        Args:
            caller: of the layer that is called.
            grad: whether autograd records the sums.
            rows: of the input of that layer.
        """
        if self.sums is not None:
            self.forget()
        tensors = None if self.lineup is None else self.lineup.tensors_if_unchanged(caller, grad)
        if self.lineup is None or tensors is None:
            self.lineup = None
            members = self._summed_now(_weight_of(caller), grad, self._wanted(caller, rows))
            self.lineup, tensors = Lineup(members, grad), _tensors_of(members)
        self.times += 1
        place = place_now(_weight_of(caller))
        self.sums = sums = self._sums_of(self.lineup, tensors, place[0])
        everything, done = (range(len(self.lineup.references)), range(len(sums.blocks))), _forgetting(self, sums)
        values = with_graph(sums, *everything, sums.lefts, sums.rights, done) if grad else sums.compute()
        self.lineup.hand_out(values, tensors)
        self.grad, self.place = grad, place  # last: from here on the sums are read

    def look_again_without(self, member: Member) -> None:
        """Look for the members again, if ``member``, which does not act now, is summed in vain."""
        if self.lineup is not None and id(member) in self.lineup.included:
            self.lineup = None

    def _wanted(self, caller: Member, rows: int) -> list[Member]:
        """The members that act, and whose layers are expected to read their sums: others would be for nobody."""
        growth = rows / caller.input_rows if caller.input_rows else 1.0
        wanted = (member for member in self.alive() if member.is_wanted(rows, growth))
        return [member for member in wanted if member.is_live(member.layer())]

    def _summed_now(self, first: Tensor, grad: bool, live: list[Member]) -> list[Member]:
        """Those of the members ``live`` that can be summed together with the weight ``first``."""
        tensors: list[Any] = [parameters.get(key) for member in live for parameters, key in member.sources]
        if not set(map(type, tensors)) <= PLAIN:
            self.checked = []
            return [member for member in live if member.can_be_summed(first) and not member.is_called_alone(grad)]
        checked = [first.dtype, *map(id, tensors), *map(Tensor.data_ptr, tensors)]
        if checked != self.checked:
            self.usable, self.checked = [member.can_be_summed(first) for member in live], checked
        usable = [member for member, can_be in zip(live, self.usable, strict=True) if can_be]
        return [member for member in usable if not member.is_called_alone(grad)]

    def _sums_of(self, lineup: Lineup, tensors: list[Any], dtype: Any) -> WeightSums:
        lefts, rights = lineup.factors(tensors)
        weights = [tensors[at] for at in lineup.weights]
        can_be_planned = lineup.has_plain_factors and not is_capturing(weights[0])
        if lineup.addresses != self.addresses:
            blocks = lineup.blocks(weights)
            self.kinds, self.blocks, self.plan = _kinds(weights, blocks, lefts), blocks, None
            self.addresses = lineup.addresses  # last: from here on those are used
            if can_be_planned and SumPlan.can_be_used(weights, self.blocks, lefts, rights):
                self.plan = SumPlan(weights, self.blocks, lefts, rights)
        if can_be_planned and self.plan is not None:
            return PlannedSums(self.plan, self.blocks, lefts, rights, lineup.scale, dtype)
        return BatchedSums(weights, self.kinds, self.blocks, lefts, rights, lineup.scale, dtype)

    def forget(self) -> None:
        """Let go of the sums."""
        self.grad = None  # first: from here on none is read
        for member in self.alive():
            member.value, member.was_read = None, False
        self._clear()

    def forget_after_backward(self) -> None:
        """Let go of the sums at the end of the backward pass that runs now: no node tells that it recomputed all."""
        if not self.is_forgotten_soon:
            self.is_forgotten_soon = True
            call_after_backward(_forgetting(self, self.sums))

    def __reduce__(self) -> tuple[type[SumGroup], tuple[()]]:
        # The members of a copy join it by themselves: a copy of a part of a model has its own layers alone.
        return SumGroup, ()


def _kinds(weights: list[Tensor], blocks: list[Block], lefts: tuple[Tensor, ...]) -> list[list[int]]:
    """The indices of the blocks of each kind: of one shape, strides and rank, all whole weights or all parts."""
    kinds: dict[object, list[int]] = {}
    for index, (block, left) in enumerate(zip(blocks, lefts, strict=True)):
        weight = weights[block.weight]
        kind = block.is_whole(weight), weight.shape[1:], weight.stride(), left.shape
        kinds.setdefault(kind, []).append(index)
    return list(kinds.values())


def _forgetting(group: SumGroup, sums: Any) -> Callable[[], None]:
    """Let ``group`` forget ``sums``; holds neither of them."""
    return partial(_forget, weakref.ref(group), weakref.ref(sums))


def _forget(group: weakref.ref[SumGroup], sums: weakref.ref[WeightSums]) -> None:
    held = group()
    if held is not None and held.sums is not None and held.sums is sums():
        held.forget()
