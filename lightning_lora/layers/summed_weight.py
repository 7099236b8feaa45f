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

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.sum_group import SumGroup
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops import dispatch
from lightning_lora.ops.weight_batch import is_dense
from lightning_lora.ops.weight_sums import with_graph
from lightning_lora.torch_internals import (
    backward_id,
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
    start = 0  # of its facts among those of the group
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
        group, adapters = self.group, self.adapters
        if type(x) is not Tensor or not adapters.enabled or is_transformed():
            return None
        if not self.always:
            if self.size > MAX_ELEMENTS or x.numel() // self.width * self.size > MAX_WORK:
                return None
            if not x.is_cuda and x.device.type not in dispatch.DEVICES:
                return None
        for pair in self.pairs:
            if pair.dropout and pair.training:
                return None
            pair.note_read()
        grad, recomputes = torch.is_grad_enabled(), backward_id() >= 0
        is_stale = self.value is None if recomputes else self.was_read or group.grad is not grad
        if (is_stale or group.place != group.place_now() or self.is_changed()) and not group.sum(grad):
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

    def is_changed(self) -> bool:
        """Whether W0, A or B was written, replaced or moved since the sum was made."""
        position, facts = self.start, self.group.facts
        for parameters, key in self.sources:
            tensor: Any = parameters[key]
            if tensor._version != facts[position] or tensor.data_ptr() != facts[position + 1]:
                return True
            if tensor is not facts[position + 2]:
                return True
            position += 3
        return False

    def can_be_summed(self, first: Any) -> bool:
        """Whether W0, A and B, plain tensors, are on the device of the weight ``first``, and W0 is not freed."""
        tensors: list[Any] = [parameters.get(key) for parameters, key in self.sources]
        return (
            not any(tensor.is_inference() for tensor in tensors)
            and tensors[0].dtype == first.dtype
            and is_dense(tensors[0])
            and all(tensor.device == first.device and tensor.untyped_storage().size() for tensor in tensors)
        )

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
    summed: SummedWeight | None = layer._modules["lora"].sums.get(key)  # type: ignore[union-attr, operator]
    if summed is None:
        return None
    if torch.compiler.is_compiling():
        return summed.traced() if summed.always else None
    return summed.read(x)
