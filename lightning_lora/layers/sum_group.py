"""Layers that are summed together: when their sums are made, and what they are made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.fused_linear import compute_dtype
from lightning_lora.ops.weight_sum_plan import SumPlan
from lightning_lora.ops.weight_sums import BatchedSums, PlannedSums, WeightSums, with_graph
from lightning_lora.torch_internals import cuda_stream_id, has_module_hooks, has_tensor_hooks

if TYPE_CHECKING:
    from lightning_lora.layers.summed_weight import SummedWeight

PLAIN = {Tensor, nn.Parameter}
REQUIRES_GRAD = attrgetter("requires_grad")


class SumGroup:
    """Layers that are summed together: neighbours in the model, with weights of one dtype."""

    addresses: Sequence[int] = ()  # of the tensors that were found to be plain
    facts: list[Any]  # version, address and object of each tensor when the sums were made
    kinds: list[list[int]]
    plan: SumPlan | None = None

    def __init__(self) -> None:
        self.members: list[SummedWeight] = []
        self.facts = []
        self._clear()

    def _clear(self) -> None:
        self.sums: WeightSums | None = None
        self.summed: list[SummedWeight] = []
        self.grad: bool | None = None
        self.place: tuple[object, ...] = ()

    def first_weight(self) -> Any:
        """W0 of the first layer; the others must have its dtype and device."""
        first = self.members[0]
        return first.layer._parameters[first.key]

    def place_now(self) -> tuple[object, ...]:
        """The dtype of the result, the stream that computes it, and whether it is an inference tensor."""
        weight = self.first_weight()
        if not weight.is_cuda:
            return compute_dtype(weight), None, torch.is_inference_mode_enabled()
        dtype = compute_dtype(weight) if torch.is_autocast_enabled("cuda") else weight.dtype
        return dtype, cuda_stream_id(weight.device), torch.is_inference_mode_enabled()

    def sum(self, grad: bool) -> bool:
        """Sum the weights of all layers that are adapted now; returns whether that is possible."""
        self.forget()
        members = [m for m in self.members if m.layer._modules.get("lora") is m.adapters and m.adapters.enabled]
        if not self._can_sum(members):
            return False
        self.grad, self.place, self.summed = grad, self.place_now(), members
        scale, dtype = members[0].pairs[0].scale, self.place[0]
        lefts, rights = zip(*[member.factors(scale) for member in members], strict=True)
        self.sums = sums = self._sums(members, lefts, rights, scale, dtype)
        everything, forgetting = range(len(members)), _forgetting(self, sums)
        values = with_graph(sums, everything, lefts, rights, forgetting) if grad else tuple(sums.compute())
        for member, value in zip(members, values, strict=True):
            member.value = value
        if any(map(has_tensor_hooks, lefts + rights)):
            for member, left, right in zip(members, lefts, rights, strict=True):
                member.has_watched_factors = has_tensor_hooks(left) or has_tensor_hooks(right)
        return True

    def _sums(self, members: list[SummedWeight], *arguments: Any) -> WeightSums:
        scale = arguments[2]
        if self.plan is not None and all(member.pairs[0].scale == scale for member in members):
            return PlannedSums(self.plan, *arguments)
        return BatchedSums(_weights_of(members), self.kinds, *arguments)

    def _can_sum(self, members: list[SummedWeight]) -> bool:
        """Whether the weights are frozen and whole, and no hook expects a call of a pair."""
        tensors: list[Any] = [parameters.get(key) for member in members for parameters, key in member.sources]
        if not tensors or not {*map(type, tensors)} <= PLAIN:
            return False
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self.addresses or any(map(is_not, tensors, self.facts[2::3])):
            self._survey(members, addresses)
        if not self.addresses or any(map(REQUIRES_GRAD, _weights_of(members))):
            return False
        self.facts = [fact for tensor in tensors for fact in (tensor._version, tensor.data_ptr(), tensor)]
        return not any(has_module_hooks(pair) for member in members for pair in member.pairs)

    def _survey(self, members: list[SummedWeight], addresses: list[int]) -> None:
        """What holds as long as the tensors are the same, where they are."""
        first = self.first_weight()
        self.facts, self.addresses = [], addresses if all(member.can_be_summed(first) for member in members) else []
        self.kinds, self.plan = (_kinds(members), _plan(members)) if self.addresses else ([], None)
        starts = accumulate((len(member.sources) for member in members), initial=0)
        for member, start in zip(members, starts, strict=False):
            member.start = 3 * start

    def forget(self) -> None:
        """Let go of the sums."""
        for member in self.members:
            member.forget()
        self._clear()

    def __reduce__(self) -> tuple[type[SumGroup], tuple[()]]:
        # The members of a copy join it by themselves: a copy of a part of a model has its own layers alone.
        return SumGroup, ()


def _kinds(members: list[SummedWeight]) -> list[list[int]]:
    """The indices of members with weights of one shape, strides and rank, for each such kind."""
    kinds: dict[object, list[int]] = {}
    for index, member in enumerate(members):
        weight: Any = member.layer._parameters[member.key]
        kind = weight.shape, weight.stride(), sum(pair.r for pair in member.pairs)
        kinds.setdefault(kind, []).append(index)
    return list(kinds.values())


def _plan(members: list[SummedWeight]) -> SumPlan | None:
    """A plan for the kernels, where A and B themselves are the factors, and stay where they are."""
    if not all(member.is_whole for member in members):
        return None
    weights, (lefts, rights) = _weights_of(members), zip(*[m.factors(m.pairs[0].scale) for m in members], strict=True)
    return SumPlan(weights, lefts, rights) if SumPlan.can_be_used(weights, lefts, rights) else None


def _weights_of(members: list[SummedWeight]) -> list[Any]:
    return [member.layer._parameters[member.key] for member in members]


def _forgetting(group: SumGroup, sums: WeightSums) -> Callable[[], None]:
    """Let ``group`` forget ``sums``; holds neither of them."""
    return partial(_forget, weakref.ref(group), weakref.ref(sums))


def _forget(group: weakref.ref[SumGroup], sums: weakref.ref[WeightSums]) -> None:
    held = group()
    if held is not None and held.sums is not None and held.sums is sums():
        held.forget()
