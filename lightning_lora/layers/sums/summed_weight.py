"""The weight's side of the method: a layer runs its original forward on ``W0 + scale * B A``.

The other side computes ``W0 x + scale * B (A x)``, a few small kernels for each layer. Where launching these takes
longer than computing them, it is faster to sum the weights: neighbours in a model are a group, whose sums are a few
kernels for all of them (:mod:`lightning_lora.ops.sums.weight_sums`). The price is a gradient of each adapted
weight, as in full fine-tuning, and a copy of the adapted weights.

The sums are made when the first layer of a group is called, and again when a layer is called for the second time: that
is another forward pass, before which any value may have changed. In between, versions and addresses show changes.
A write through ``.data`` in the same memory changes neither, so a layer that has not read its sum yet does not see it.
While a backward pass runs, a call is a recomputation under activation checkpointing, which reads the same sums.

A choice of adapters for the whole batch has sums of its own, so threads with different choices do not share them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.sums.group import SumGroup, place_now
from lightning_lora.layers.sums.sizes import is_ever_faster, is_faster
from lightning_lora.layers.weight_view import Rows, separate_rows
from lightning_lora.ops.fused_linear import PLAIN
from lightning_lora.ops.sums.batch import is_dense
from lightning_lora.ops.sums.weight_sums import rescaled, with_graph
from lightning_lora.torch_internals import (
    backward_id,
    has_module_hooks,
    has_tensor_hooks,
    is_transformed,
    saved_tensors_have_hooks,
)

MAX_CHOICES = 128  # whose plans a layer keeps; their sums are freed when the choice ends


class SummedWeight:
    """``W0 + scale * B A`` of one parameter of a layer, as its forward reads it.

    Args:
        layer: the adapted layer.
        key: the name of the parameter.
        group: the layers that are summed together with this one.
        width: features of the input for one position of the output: input features, or channels.
        size: elements of the weight.
        always: whether the sum is read wherever it can be made, whatever the sizes.
        names: the adapters that a choice lets act, all fully; ``None`` for what acts without a choice.
    """

    value: Tensor | None = None
    index = 0  # in the group
    blocks = range(0)  # the indices of its blocks of rows in the group
    facts: Sequence[object] = ()
    strengths: dict[str, float] | None = None  # with which the adapters of `pairs` and `sources` act
    adapters: Mapping[str, Any] = MappingProxyType({})  # of the layer when `pairs` and `sources` were looked up
    pairs: Sequence[Adapter] = ()
    sources: Sequence[tuple[dict[str, Any], str]] = ()  # the dictionaries with W0, and A and B of each pair
    separate: Sequence[Rows | None] = ()  # the rows of each pair, which has them alone; none if pairs share rows
    was_read = False
    input_rows, noted_at = 0, 0  # of the smallest input since the group was summed for that time; 0: never called
    has_watched_factors = False  # a hook waits for the gradient of A or B, and must see none that is ``None``

    def __init__(
        self,
        layer: LoRALayer,
        key: str,
        group: SumGroup,
        width: int,
        size: int,
        always: bool,
        names: frozenset[str] | None = None,
    ) -> None:
        self.layer, self.key = weakref.ref(layer), key  # the layer holds this
        self.group, self.width, self.size, self.always = group, width, size, always
        self.names = names
        self.of_choices: dict[frozenset[str], SummedWeight] = {}
        group.members.append(weakref.ref(self))

    def of_choice(self, names: frozenset[str]) -> SummedWeight | None:
        """The sum in which the adapters ``names`` act; it is in a group with those of the same layers."""
        summed = self.of_choices.get(names)
        if summed is None:
            for member in self.group.alive():
                member.add_choice(names)
            summed = self.of_choices.get(names)  # another thread may have taken it away
        return summed

    def add_choice(self, names: frozenset[str]) -> None:
        """Have a sum in which the adapters ``names`` act."""
        layer = self.layer()
        if layer is None or names in self.of_choices:
            return
        if len(self.of_choices) >= MAX_CHOICES:
            self.of_choices.clear()
        group = self.group.of_choice(names)
        self.of_choices[names] = SummedWeight(layer, self.key, group, self.width, self.size, self.always, names)

    def forget_choices(self) -> None:
        """Drop the sums of choices; they may hold adapters that were removed."""
        self.of_choices.clear()
        self.group.of_choices.clear()

    def forget_values(self) -> None:
        """Called when the layer runs on its merged weight: a recomputation must not read the sums of an older pass."""
        for summed in (self, *self.of_choices.values()):
            summed.value = None

    def is_live(self, layer: LoRALayer | None) -> bool:
        """Whether ``layer`` is the one that this was made for and computes with it, and its adapters act.

        Another adapter, and another matrix of it, may take the place of one at any time.
        """
        adapters: Any = None if layer is None else layer._modules.get("lora")
        if adapters is None or layer is not self.layer() or not adapters.enabled:
            return False
        if adapters.sums.get(self.key) is not self and not self._is_of_choice(adapters):
            return False
        strengths = None if adapters.acting is None or self.names is not None else dict(adapters.strengths)
        if strengths != self.strengths or adapters._modules != self.adapters:
            self.facts = ()
            self.pairs = adapters.summed(self.key, self.names)
            matrices: list[Any] = [(pair._parameters, name) for pair in self.pairs for name in ("A", "B")]
            self.sources = [(layer._parameters, self.key), *matrices]  # type: ignore[union-attr]
            self.separate = separate_rows([pair.part for pair in self.pairs])
            self.strengths, self.adapters = strengths, dict(adapters._modules)
        return bool(self.pairs)

    def _is_of_choice(self, adapters: Any) -> bool:
        summed: SummedWeight | None = adapters.sums.get(self.key)
        return summed is not None and self.names is not None and summed.of_choices.get(self.names) is self

    def read(self, layer: LoRALayer, x: Tensor) -> Tensor | None:
        """The sum, or ``None`` where the layer must compute on the side of the activations.

        Args:
            layer: the adapted layer that is called.
            x: its input.
        """
        group, weight = self.group, layer._parameters.get(self.key)
        if type(x) is not Tensor or type(weight) not in PLAIN or is_transformed():
            return None
        rows = x.numel() // self.width
        # Where there are sums, they are faster for some inputs.
        if not (self.always or ((self.value is not None or is_ever_faster(x)) and is_faster(self.size, rows))):
            self._end_pass()
            self._note(rows)
            if not is_faster(self.size, self.input_rows):
                group.look_again_without(self)
            return None
        if not self.is_live(layer):
            self._end_pass()
            group.look_again_without(self)
            return None
        for pair in self.pairs:
            if pair.dropout and pair.training:
                return None
            pair.note_read()
        grad, recomputes = torch.is_grad_enabled(), backward_id() >= 0
        if recomputes and self.is_called_alone(grad):  # the first pass may have had no gradients, and a sum
            return None
        is_stale = self.value is None or (not recomputes and (self.was_read or group.grad is not grad))
        if is_stale or self.facts != self.facts_now() or group.place != place_now(weight):  # type: ignore[arg-type]
            if not self.can_be_summed(weight) or self.is_called_alone(grad):
                self._end_pass()
                group.look_again_without(self)
                return None
            group.sum(self, grad, rows)
            if self.facts != self.facts_now():  # the group has not seen a change of this member
                group.summed = None
                group.sum(self, grad, rows)
        self.was_read = True
        self._note(rows)
        if recomputes:
            group.forget_after_backward()
        value, sums = self.value, group.sums
        if value is None or sums is None:  # another thread computes with the model, too
            return None
        if grad and (self.has_watched_factors or not value.requires_grad or (recomputes and _needs_own_graph())):
            return with_graph(sums, [self.index], self.blocks, *self.factors(sums.scale))[0]
        return value

    def _end_pass(self) -> None:
        """Free the sums if this one was read: the call that takes the other side begins the next forward pass."""
        if self.was_read and backward_id() < 0:
            self.group.forget()

    def _note(self, rows: int) -> None:
        if self.noted_at == self.group.times:
            rows = min(rows, self.input_rows)
        self.input_rows, self.noted_at = rows, self.group.times

    def is_wanted(self, rows: int, growth: float) -> bool:
        """Whether the layer is expected to read the sum in this forward pass.

        Args:
            rows: of the input of the layer that is called now, for one that was not called yet.
            growth: that number, divided by what it was in the last pass.
        """
        return self.always or is_faster(self.size, self.input_rows * growth if self.input_rows else rows)

    def facts_now(self) -> list[object]:
        """The scales, and of W0 and each A and B the version, the address and whether it trains.

        Any change of these tensors changes one of them.
        """
        facts: list[object] = [pair.scale for pair in self.pairs]
        try:
            for parameters, key in self.sources:
                tensor = parameters[key]
                facts += tensor._version, tensor.data_ptr(), tensor.requires_grad
            return facts
        except (KeyError, AttributeError, RuntimeError, TypeError):
            return []  # one of them is computed, taken away, sharded or an inference tensor

    def can_be_summed(self, first: Any) -> bool:
        """Whether W0, A and B are plain tensors on the device of the weight ``first``, neither sharded nor computed."""
        tensors: list[Any] = [parameters.get(key) for parameters, key in self.sources]
        return set(map(type, tensors)) <= PLAIN and _are_alike(first, tensors)

    def is_called_alone(self, grad: bool) -> bool:
        """Whether W0 needs a gradient itself, or a hook on a pair expects a call of it."""
        weights, key = self.sources[0]
        return (grad and weights[key].requires_grad) or any(map(has_module_hooks, self.pairs))

    def is_watched(self) -> bool:
        """Whether a hook waits for the gradient of A or B."""
        return any(has_tensor_hooks(parameters[key]) for parameters, key in self.sources[1:])

    def rows(self, weight: Tensor) -> list[tuple[int, int]]:
        """The first row of each of its blocks, and the one after the last."""
        whole = 0, len(weight)
        return [(rows.start, rows.stop) if rows else whole for rows in self.separate] or [whole]

    def factors_in_group(self, scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """The factors for the graph of the group, which goes on to those of layers that were not called, too."""
        lefts, rights = self.factors(scale)
        if self.has_watched_factors:
            return [left.detach() for left in lefts], [right.detach() for right in rights]
        return lefts, rights

    def factors(self, scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """The left factor ``(rows, r)`` and the right factor ``(r, columns)`` of each block's delta / scale."""
        matrices: list[Any] = [pair._parameters for pair in self.pairs]
        rights = [each["A"] for each in matrices]
        lefts = [
            each["B"] if pair.scale == scale else rescaled(each["B"], pair.scale / scale)
            for pair, each in zip(self.pairs, matrices, strict=True)
        ]
        if self.separate:
            return lefts, rights
        weights, key = self.sources[0]
        weight: Any = weights[key]
        factors = [pair.part.factors(A, B, weight) for pair, A, B in zip(self.pairs, rights, lefts, strict=True)]
        return [torch.cat([left for left, _ in factors], 1)], [torch.cat([right for _, right in factors])]

    def __getstate__(self) -> dict[str, object]:
        kept = {key: vars(self)[key] for key in ("key", "group", "width", "size", "always")}
        return {"layer": self.layer(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _are_alike(first: Tensor, tensors: list[Tensor]) -> bool:
    """Whether W0, A and B have values on the device of ``first``, and W0 its dtype, without gaps between its rows."""
    if tensors[0].dtype != first.dtype or not is_dense(tensors[0]):
        return False
    return all(  # the address is 0 where FSDP1 has freed the memory
        not (tensor.is_inference() or tensor.is_meta) and tensor.device == first.device and tensor.data_ptr()
        for tensor in tensors
    )


def _needs_own_graph() -> bool:
    """Whether a recomputation needs another graph than that of the sums.

    The first pass under reentrant checkpointing has no graph, and each part of the second pass has its own. Without
    reentry a recomputation has the graph of its forward pass, unless a pass without gradients came in between.
    """
    return not saved_tensors_have_hooks()
