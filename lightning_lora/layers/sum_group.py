"""Layers that are summed together: when their sums are made, and when they are let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
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
from lightning_lora.torch_internals import any_autocast_enabled, call_after_backward, cuda_stream_id, is_capturing


class Member(Protocol):
    """What the group asks of a :class:`lightning_lora.layers.summed_weight.SummedWeight`."""

    value: Tensor | None
    index: int
    blocks: range
    facts: Sequence[object]
    has_watched_factors: bool
    pairs: Sequence[Adapter]
    sources: Sequence[tuple[dict[str, Any], str]]
    separate: Sequence[Rows | None]
    layer: weakref.ref[LoRALayer]

    def is_live(self, layer: LoRALayer | None) -> bool:
        """Whether ``layer`` computes with it now."""

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

    def forget(self) -> None:
        """Let go of the sum."""

    def add_choice(self, names: frozenset[str]) -> None:
        """Have a sum in which the adapters ``names`` act."""


def place_now(weight: Tensor) -> tuple[object, ...]:
    """The dtype of a sum with ``weight``, the stream that computes it, and whether it is an inference tensor."""
    dtype = weight.dtype
    if any_autocast_enabled() and torch.is_autocast_enabled(weight.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(weight.device.type)
    return dtype, weight.is_cuda and cuda_stream_id(weight.device), torch.is_inference_mode_enabled()


class SumGroup:
    """Layers that are summed together: neighbours in the model, with weights of one dtype."""

    def __init__(self) -> None:
        self.members: list[weakref.ref[Member]] = []  # a layer that leaves the model leaves its group
        self.of_choices: weakref.WeakValueDictionary[frozenset[str], SumGroup] = weakref.WeakValueDictionary()
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

    def sum(self, first: Tensor, grad: bool) -> None:
        """Sum the weights of all layers that are adapted now, and can be summed together with the weight ``first``."""
        self.forget()
        members = self._summed_now(first, grad)
        first_block = 0
        for index, member in enumerate(members):
            member.index, member.has_watched_factors = index, grad and member.is_watched()
            member.blocks = range(first_block, first_block + (len(member.separate) or 1))
            first_block = member.blocks.stop
        place = place_now(first)
        self.sums = sums = self._sums_of(members, members[0].pairs[0].scale, place[0])
        everything, done = (range(len(members)), range(len(sums.blocks))), _forgetting(self, sums)
        values = with_graph(sums, *everything, sums.lefts, sums.rights, done) if grad else sums.compute()
        for member, value in zip(members, values, strict=True):
            member.facts, member.value = member.facts_now(), value
        self.grad, self.place = grad, place  # last: from here on the sums are read

    def _summed_now(self, first: Tensor, grad: bool) -> list[Member]:
        """The members that are summed together with the weight ``first``."""
        live = [member for member in self.alive() if member.is_live(member.layer())]
        tensors: list[Any] = [parameters.get(key) for member in live for parameters, key in member.sources]
        if not set(map(type, tensors)) <= PLAIN:
            self.checked = []
            return [member for member in live if member.can_be_summed(first) and not member.is_called_alone(grad)]
        checked = [first.dtype, *map(id, tensors), *map(Tensor.data_ptr, tensors)]
        if checked != self.checked:
            self.usable, self.checked = [member.can_be_summed(first) for member in live], checked
        usable = [member for member, can_be in zip(live, self.usable, strict=True) if can_be]
        return [member for member in usable if not member.is_called_alone(grad)]

    def _sums_of(self, members: list[Member], scale: float, dtype: Any) -> WeightSums:
        factors = [member.factors_in_group(scale) for member in members]
        lefts, rights = (tuple(chain.from_iterable(part)) for part in zip(*factors, strict=True))
        weights = [parameters[key] for parameters, key in [member.sources[0] for member in members]]
        tensors: list[Any] = [parameters[key] for member in members for parameters, key in member.sources]
        addresses = list(map(Tensor.data_ptr, tensors))
        can_be_planned = not is_capturing(weights[0]) and all(
            member.separate and all(pair.scale == scale for pair in member.pairs) for member in members
        )
        if addresses != self.addresses:
            self.blocks = [Block(i, *rows) for i, member in enumerate(members) for rows in member.rows(weights[i])]
            self.kinds, self.plan, self.addresses = _kinds(weights, self.blocks, lefts), None, addresses
            if can_be_planned and SumPlan.can_be_used(weights, self.blocks, lefts, rights):
                self.plan = SumPlan(weights, self.blocks, lefts, rights)
        if can_be_planned and self.plan is not None:
            return PlannedSums(self.plan, self.blocks, lefts, rights, scale, dtype)
        return BatchedSums(weights, self.kinds, self.blocks, lefts, rights, scale, dtype)

    def forget(self) -> None:
        """Let go of the sums."""
        self._clear()
        for member in self.alive():
            member.forget()

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
