"""Copies of A and B of several layers at once, in the dtype of their products.

Without gradients they are written into the same memory in each forward pass. With gradients each pass has its own,
which backward reads, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.ops.fused_linear import PLAIN
from lightning_lora.ops.mixed_products import Layout, PairCopies, copies_of
from lightning_lora.torch_internals import cuda_stream_id, is_capturing, versions_of

MAX_KEPT = 2**21  # elements of A and B of one layer, on average, for which that memory stays
_shape = attrgetter("shape")


class Member(Protocol):
    """A layer whose pairs are copied together with those of others."""

    copies: PairCopies | None
    facts: Sequence[object]
    was_read: bool

    def matrices(self) -> list[Any]:
        """Every A, then every B, as they are now; ``None`` for one that is computed."""


class CopyGroup:
    """Layers whose pairs are copied together."""

    def __init__(self) -> None:
        self.members: list[weakref.ref[Any]] = []  # they hold the group
        # The form of the memory that is written again, the order and the parts of it, and the copies in it.
        self.kept: tuple[object, Layout | None, list[Tensor], list[PairCopies]] = None, None, [], []

    def copy(self, first: Member, matrices: Sequence[Tensor], dtype: torch.dtype) -> PairCopies:
        """Copy the pairs of all layers that are like the ``matrices`` of the ``first``, and return its copies."""
        layers: list[Member] = []
        every: list[list[Tensor]] = []
        for reference in self.members:  # in their order, so that another thread writes the same values
            layer = reference()
            others = [] if layer is None else layer.matrices()
            if layer is first or (layer is not None and _are_like(others, matrices[0])):
                layers.append(layer)
                every.append(others)
        keeps = not torch.is_grad_enabled() and not is_capturing(matrices[0])
        copies = self._written_again(layers, every, dtype) if keeps else copies_of(every, dtype)
        for layer, others, each in zip(layers, every, copies, strict=True):
            layer.copies, layer.facts, layer.was_read = each, facts_of(others, dtype), False
        return copies[layers.index(first)]

    def _written_again(self, layers: list[Member], every: list[list[Tensor]], dtype: torch.dtype) -> list[PairCopies]:
        """Copies in memory that the next pass writes again, if there are not too many."""
        matrices = list(chain.from_iterable(every))
        form = [*place_of(matrices[0], dtype), *map(id, layers), *map(_shape, matrices)]
        known, layout, parts, copies = self.kept
        if form == known and layout is not None:
            torch._foreach_copy_(parts, layout.in_order(every))
            for each in copies:
                each.forget_forms()
            return copies
        with torch.inference_mode(False):
            copies = copies_of(every, dtype)
        flat = copies[0].flat
        if flat.numel() <= MAX_KEPT * len(copies):
            for each in copies:
                each.is_overwritten = True
            layout = Layout(every)
            self.kept = form, layout, _parts_of(flat, layout.in_order(every)), copies
        return copies


def _parts_of(flat: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """The parts of ``flat``, in which there are copies of ``matrices``, in their shapes."""
    parts = flat.split_with_sizes([matrix.numel() for matrix in matrices])
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def place_of(matrix: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """Where copies of ``matrix`` in ``dtype`` are made: also the stream, for CUDA."""
    device = matrix.device
    return dtype, device, cuda_stream_id(device) if device.type == "cuda" else None


def facts_of(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[object, ...]:
    """What differs after A and B were changed, or were copied to another device, dtype or stream."""
    return *place_of(matrices[0], dtype), *versions_of(*matrices), *map(Tensor.data_ptr, matrices)


def _are_like(matrices: Sequence[Any], first: Tensor) -> bool:
    """Whether ``matrices`` are plain tensors of the dtype and device of ``first``."""
    if not PLAIN.issuperset(map(type, matrices)):
        return False
    return {(each.dtype, each.device) for each in matrices} == {(first.dtype, first.device)}
