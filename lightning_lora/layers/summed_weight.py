"""The weight's side of the method: a layer runs its original forward on ``W0 + scale * B A``.

The other side computes ``W0 x + scale * B (A x)``, a few small kernels for each layer. Where launching these takes
longer than computing them, it is faster to sum the weights: neighbours in a model are a group, whose sums are a few
kernels for all of them (:mod:`lightning_lora.ops.weight_sums`). The price is a gradient of each adapted
weight, as in full fine-tuning, and a copy of the adapted weights.

The sums are made when the first layer of a group is called, and again when a layer is called for the second time: that
is another forward pass, before which any value may have changed. In between, versions and addresses tell of changes.
While a backward pass runs, a call is a recomputation under activation checkpointing, which reads the same sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops import dispatch
from lightning_lora.ops.weight_batch import is_dense
from lightning_lora.ops.weight_sum_plan import SumPlan
from lightning_lora.ops.weight_sums import WeightSums, batched_sums, planned_sums, with_graph
from lightning_lora.torch_internals import (
    backward_id,
    cuda_stream_id,
    has_module_hooks,
    has_tensor_hooks,
    is_transformed,
    saved_tensors_have_hooks,
)

MAX_WORK = 4 * 10**10  # multiplications for the gradient of one weight; with more, the other side is faster
MAX_ELEMENTS = 2**25  # of one weight; the sum of a larger one costs more than the launches that it saves


class SummedWeight:
    """``W0 + scale * B A`` of one parameter of a layer, as its forward reads it.

    Args:
        layer: the adapted layer.
        key: the name of the parameter.
        group: the layers that are summed together with this one.
        width: features of the input at one position: input features, or channels.
        always: whether the sum is read wherever it can be made, whatever the sizes.
    """

    value: Tensor | None = None
    facts: Sequence[object] = ()
    was_read = False
    has_watched_factors = False  # a hook waits for the gradient of A or B, and must see none that is ``None``

    def __init__(self, layer: LoRALayer, key: str, group: SumGroup, width: int, always: bool) -> None:
        self.layer, self.adapters, self.key = layer, layer.lora, key
        self.group, self.width, self.always = group, width, always
        self.size = layer._parameters[key].numel()  # type: ignore[union-attr]
        group.members.append(self)

    @cached_property
    def pairs(self) -> list[Adapter]:
        """The pairs that adapt the parameter."""
        return self.adapters.by_weight()[self.key]

    @cached_property
    def sources(self) -> list[tuple[dict[str, Any], str]]:
        """Where W0, and A and B of each pair are found: another object may take their place at any time."""
        matrices: list[Any] = [(pair._parameters, name) for pair in self.pairs for name in ("A", "B")]
        return [(self.layer._parameters, self.key), *matrices]

    @cached_property
    def is_whole(self) -> bool:
        """Whether A and B of one pair are the factors as they are."""
        return len(self.pairs) == 1 and self.pairs[0].part == WeightPart(self.key)

    def read(self, x: Tensor) -> Tensor | None:
        """The sum, or ``None`` where the layer must compute on the side of the activations.

        Args:
            x: the input of the layer.
        """
        group = self.group
        if type(x) is not Tensor or not self.adapters.enabled or is_transformed():
            return None
        if not self.always:
            work = x.numel() // self.width * self.size
            if work > MAX_WORK or self.size > MAX_ELEMENTS or x.device.type not in dispatch.DEVICES:
                return None
        for pair in self.pairs:
            if pair.dropout and pair.training:
                return None
            pair.note_read()
        grad, recomputes = torch.is_grad_enabled(), backward_id() >= 0
        is_stale = self.value is None if recomputes else self.was_read or group.grad is not grad
        if (is_stale or group.place != group.place_now() or self.facts != self.facts_now()) and not group.sum(grad):
            return None
        self.was_read = True
        # The first pass under reentrant checkpointing has no graph, and each part of the second pass has its own.
        if grad and (self.has_watched_factors or (recomputes and not saved_tensors_have_hooks())):
            return self._with_own_graph()
        return self.value

    def traced(self) -> Tensor | None:
        """The sum in operations that a compiler traces."""
        total: Tensor = self.layer._parameters[self.key]  # type: ignore[assignment]
        for pair in self.pairs if self.adapters.enabled else ():
            total = pair.add_to_weight(total)
        return total

    def facts_now(self) -> list[object]:
        """The version and the address of W0, and of each A and B: others after a change."""
        facts: list[object] = []
        for parameters, key in self.sources:
            tensor: Any = parameters[key]
            facts.append(tensor._version)
            facts.append(tensor.data_ptr())
        return facts

    def can_be_summed(self, first: Any) -> bool:
        """Whether W0, A and B are plain tensors, on the device of the weight ``first``: not sharded, not computed."""
        tensors: list[Any] = [parameters.get(key) for parameters, key in self.sources]
        return (
            all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors)
            and tensors[0].dtype == first.dtype
            and is_dense(tensors[0])
            and all(tensor.device == first.device and tensor.untyped_storage().size() for tensor in tensors)
        )

    def is_live(self) -> bool:
        """Whether the layer has these adapters now, and they act."""
        return self.layer._modules.get("lora") is self.adapters and self.adapters.enabled

    def factors(self, scale: float) -> tuple[Tensor, Tensor]:
        """The left factor ``(rows, r)`` and the right factor ``(r, columns)`` of delta / scale; differentiable."""
        if self.is_whole and self.pairs[0].scale == scale:
            matrices: Any = self.pairs[0]._parameters
            return matrices["B"], matrices["A"]
        weight: Any = self.layer._parameters[self.key]
        scaled = [pair.B if pair.scale == scale else (pair.scale / scale) * pair.B for pair in self.pairs]
        factors = [pair.part.factors(pair.A, B, weight) for pair, B in zip(self.pairs, scaled, strict=True)]
        return torch.cat([left for left, _ in factors], 1), torch.cat([right for _, right in factors])

    def forget(self) -> None:
        """Let go of the sum."""
        self.value = None
        self.was_read = False

    def _with_own_graph(self) -> Tensor:
        sums = self.group.sums
        assert sums is not None
        left, right = self.factors(sums.scale)
        return with_graph(sums, [self.group.summed.index(self)], [left], [right])[0]

    def __getstate__(self) -> dict[str, object]:
        return {key: vars(self)[key] for key in ("layer", "adapters", "key", "group", "width", "size", "always")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.group.members.append(self)


def summed_weight(layer: LoRALayer, x: Tensor, key: str = "weight") -> Tensor | None:
    """What ``layer`` computes with for the input ``x`` on the weight's side; ``None`` on the activations' side."""
    summed: SummedWeight | None = layer.lora.sums.get(key)
    if summed is None:
        return None
    if torch.compiler.is_compiling():
        return summed.traced() if summed.always else None
    return summed.read(x)


class SumGroup:
    """Layers that are summed together: neighbours in the model, with weights of one dtype."""

    checked: Sequence[object] = ()  # the tensors that were found to be plain, by their addresses
    kinds: list[list[int]]
    plan: SumPlan | None = None

    def __init__(self) -> None:
        self.members: list[SummedWeight] = []
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
        dtype, on_gpu = weight.dtype, weight.is_cuda
        if torch.is_autocast_enabled("cuda" if on_gpu else weight.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(weight.device.type)
        return dtype, on_gpu and cuda_stream_id(weight.device), torch.is_inference_mode_enabled()

    def sum(self, grad: bool) -> bool:
        """Sum the weights of all layers that are adapted now; returns whether that is possible."""
        self.forget()
        members = [member for member in self.members if member.is_live()]
        if not self._can_sum(members):
            return False
        self.grad, self.place, self.summed = grad, self.place_now(), members
        scale, dtype = members[0].pairs[0].scale, self.place[0]
        lefts, rights = zip(*[member.factors(scale) for member in members], strict=True)
        self.sums = sums = self._sums(members, lefts, rights, scale, dtype)
        values: Sequence[Tensor] = sums.values
        if grad:
            values = with_graph(sums, range(len(members)), lefts, rights, _forgetting(self, sums))
        for member, value, left, right in zip(members, values, lefts, rights, strict=True):
            member.value, member.facts = value, member.facts_now()
            member.has_watched_factors = has_tensor_hooks(left) or has_tensor_hooks(right)
        return True

    @torch.no_grad()
    def _sums(
        self, members: list[SummedWeight], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float, dtype: Any
    ) -> WeightSums:
        if self.plan is not None and all(member.pairs[0].scale == scale for member in members):
            return planned_sums(self.plan, lefts, rights, scale, dtype)
        weights = _weights_of(members)
        if not torch.is_autocast_enabled(weights[0].device.type):
            return batched_sums(weights, self.kinds, lefts, rights, scale, dtype)
        with torch.autocast(weights[0].device.type, enabled=False):
            return batched_sums(weights, self.kinds, lefts, rights, scale, dtype)

    def _can_sum(self, members: list[SummedWeight]) -> bool:
        """Whether the weights are frozen and whole, and no hook expects a call of a pair."""
        sources = [source for member in members for source in member.sources]
        tensors: list[Any] = [parameters.get(key) for parameters, key in sources]
        checked = [(id(tensor), tensor.data_ptr()) for tensor in tensors if tensor is not None]
        if checked != self.checked:
            first = self.first_weight()
            self.checked = checked if all(member.can_be_summed(first) for member in members) else []
            self.kinds, self.plan = (_kinds(members), _plan(members)) if self.checked else ([], None)
        is_frozen = not any(tensor.requires_grad for tensor in _weights_of(members))
        return bool(self.checked) and is_frozen and not any(has_module_hooks(p) for m in members for p in m.pairs)

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
