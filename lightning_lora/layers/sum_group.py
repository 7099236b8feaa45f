"""Layers that are summed together: when their sums are made, and when they are let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.ops.fused_linear import PLAIN
from lightning_lora.ops.weight_sum_plan import SumPlan
from lightning_lora.ops.weight_sums import BatchedSums, PlannedSums, WeightSums, with_graph
from lightning_lora.torch_internals import any_autocast_enabled, call_after_backward, cuda_stream_id, is_capturing


class Member(Protocol):
    """What the group asks of a :class:`lightning_lora.layers.summed_weight.SummedWeight`."""

    value: Tensor | None
    index: int
    facts: Sequence[object]
    has_watched_factors: bool
    pairs: Sequence[Adapter]
    sources: Sequence[tuple[dict[str, Any], str]]
    is_whole: bool
    layer: weakref.ref[LoRALayer]

    def is_live(self, layer: LoRALayer | None) -> bool:
        """Whether ``layer`` computes with it now."""

    def can_be_summed(self, first: Any) -> bool:
        """Whether it can be summed together with the weight ``first``."""

    def is_called_alone(self, grad: bool) -> bool:
        """Whether its weight trains, or a hook expects a call of its pairs."""

    def is_watched(self) -> bool:
        """Whether a hook waits for the gradient of A or B."""

    def factors_in_group(self, scale: float) -> tuple[Tensor, Tensor]:
        """Its factors for the graph of the group."""

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
        self.addresses: list[int] = []  # of the tensors that `kinds` and `plan` are of
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
        for index, member in enumerate(members):
            member.index, member.has_watched_factors = index, grad and member.is_watched()
        place = place_now(first)
        self.sums = sums = self._sums_of(members, members[0].pairs[0].scale, place[0])
        everything, done = range(len(members)), _forgetting(self, sums)
        values = with_graph(sums, everything, sums.lefts, sums.rights, done) if grad else sums.compute()
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
        lefts, rights = zip(*[member.factors_in_group(scale) for member in members], strict=True)
        weights = [parameters[key] for parameters, key in [member.sources[0] for member in members]]
        tensors: list[Any] = [parameters[key] for member in members for parameters, key in member.sources]
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self.addresses:
            self.kinds, self.plan, self.addresses = _kinds(weights, lefts), None, addresses
            is_whole = all(member.is_whole for member in members) and not is_capturing(weights[0])
            if is_whole and SumPlan.can_be_used(weights, lefts, rights):
                self.plan = SumPlan(weights, lefts, rights)
        has_one_scale = all(member.pairs[0].scale == scale for member in members)
        if self.plan is not None and has_one_scale and not is_capturing(weights[0]):
            return PlannedSums(self.plan, lefts, rights, scale, dtype)
        return BatchedSums(weights, self.kinds, lefts, rights, scale, dtype)

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


def _kinds(weights: list[Tensor], lefts: tuple[Tensor, ...]) -> list[list[int]]:
    """The indices of layers with weights of one shape, strides and rank, for each such kind."""
    kinds: dict[object, list[int]] = {}
    for index, (weight, left) in enumerate(zip(weights, lefts, strict=True)):
        kinds.setdefault((weight.shape, weight.stride(), left.shape), []).append(index)
    return list(kinds.values())


def _forgetting(group: SumGroup, sums: Any) -> Callable[[], None]:
    """Let ``group`` forget ``sums``; holds neither of them."""
    return partial(_forget, weakref.ref(group), weakref.ref(sums))


def _forget(group: weakref.ref[SumGroup], sums: weakref.ref[WeightSums]) -> None:
    held = group()
    if held is not None and held.sums is not None and held.sums is sums():
        held.forget()
