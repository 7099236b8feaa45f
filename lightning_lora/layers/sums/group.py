"""Layers that are summed together: when their sums are computed, and when they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.sums.members import Member, SummedMembers, tensors_of, weight_of
from lightning_lora.ops.sums.batch import Block
from lightning_lora.ops.sums.plan import SumPlan
from lightning_lora.ops.sums.weight_sums import BatchedSums, PlannedSums, WeightSums, with_graph
from lightning_lora.torch_internals import any_autocast_enabled, call_after_backward, cuda_stream_id, is_capturing


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
        self.summed: SummedMembers | None = None  # the members that were summed last
        self.times = 1  # how often sums were computed, plus one: 0 is a layer that was never called
        self.layout: list[object] = []  # of the tensors that `blocks`, `kinds` and `plan` are of
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
        read: list[Member] = []  # earlier in the same pass: another call of one of them begins the next pass
        if self.sums is not None:
            read = [] if caller.was_read else [member for member in self.alive() if member.was_read]
            self.forget()
        summed = self.summed
        held = [] if summed is None else summed.members()  # the garbage collector frees none before it has its sum
        tensors = None if summed is None else summed.tensors_if_unchanged(caller, grad)
        if summed is None or tensors is None:
            self.summed = None
            held = self._selected(caller, grad, rows)
            self.summed = summed = SummedMembers(held, grad)
            tensors = tensors_of(held)
        self.times += 1
        place = place_now(weight_of(caller))
        self.sums = sums = self._sums_of(summed, tensors, place[0])
        everything, done = (range(len(held)), range(len(sums.blocks))), _forgetting(self, sums)
        values = with_graph(sums, *everything, sums.lefts, sums.rights, done) if grad else sums.compute()
        summed.hand_out(values, tensors)
        for member in read:
            member.was_read = True
        self.grad, self.place = grad, place  # last: from here on the sums are read

    def look_again_without(self, member: Member) -> None:
        """Select the members again if ``member``, which does not read its sum now, is one of them."""
        if self.summed is not None and id(member) in self.summed.included:
            self.summed = None

    def _selected(self, caller: Member, grad: bool, rows: int) -> list[Member]:
        """The members that act, can be summed together with ``caller``, and whose sums are expected to be read."""
        growth, first = rows / caller.input_rows if caller.input_rows else 1.0, weight_of(caller)
        wanted = (member for member in self.alive() if member.is_wanted(rows, growth))
        live = [member for member in wanted if member.is_live(member.layer())]
        return [member for member in live if member.can_be_summed(first) and not member.is_called_alone(grad)]

    def _sums_of(self, summed: SummedMembers, tensors: list[Any], dtype: Any) -> WeightSums:
        lefts, rights = summed.factors(tensors)
        weights = [tensors[at] for at in summed.weights]
        can_be_planned = summed.has_plain_factors and not is_capturing(weights[0])
        if summed.layout != self.layout:
            blocks = summed.blocks(weights)
            self.kinds, self.blocks, self.plan = _kinds(weights, blocks, lefts), blocks, None
            self.layout = summed.layout  # last: from here on those are used
            if can_be_planned and SumPlan.can_be_used(weights, self.blocks, lefts, rights):
                self.plan = SumPlan(weights, self.blocks, lefts, rights)
        if can_be_planned and self.plan is not None:
            return PlannedSums(self.plan, self.blocks, lefts, rights, summed.scale, dtype)
        return BatchedSums(weights, self.kinds, self.blocks, lefts, rights, summed.scale, dtype)

    def forget(self) -> None:
        """Free the sums."""
        self.grad = None  # first: from here on none is read
        for member in self.alive():
            member.value, member.was_read = None, False
        self._clear()

    def forget_after_backward(self) -> None:
        """Free the sums after the current backward pass, in which any later node may recompute a forward."""
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
