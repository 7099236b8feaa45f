"""Linear layers in a mixed batch: what is known of each of them, and copies of A and B of several layers at once.

At small sizes the host limits the speed of a step. So what a layer computes with is looked up once for the names that
act, and A and B are copied in the dtype of the products for neighbours in a model together.

They are copied when the first layer of a group is called, and again when a layer is called for the second time: that is
another forward pass, before which any value may have changed. In between, versions and addresses show a change.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Pairs
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.choice import Choice
from lightning_lora.layers.mixed.copies import CopyGroup, facts_of
from lightning_lora.ops.linear import fuse_mixed
from lightning_lora.ops.mixed_products import PairCopies
from lightning_lora.ops.packed.weight import Weight
from lightning_lora.torch_internals import GLOBAL_HOOKS, hooks_of

MAX_ELEMENTS = 2**24  # of A and B that are copied together
MAX_NAMES = 16  # sets of names of which layers keep what they know
_settings = attrgetter("scale", "dropout", "training")


class MixedLayer:
    """The pairs of one linear layer that act by name.

    Args:
        adapters: of the layer.
        names: that act in some sample.
        group: the layers whose pairs are copied together.
    """

    copies: PairCopies | None = None
    facts: Sequence[object] = ()  # of A and B when they were copied
    was_read = False
    settings: Sequence[object] = ()  # of the pairs, from which `scales` and `dropout` are
    scales: tuple[float, ...] = ()
    dropout: float | None = 0.0  # of all pairs; `None` if they differ

    def __init__(self, adapters: Adapters, names: frozenset[str], group: CopyGroup) -> None:
        self.modules, self.group = dict(adapters._modules), group
        self.names = tuple(name for name in self.modules if name in names)
        pairs: list[Any] = [self.modules[name] for name in self.names]
        self.pairs = pairs
        # Several matrices, as those of a fused query, key and value, need the plain formula.
        self.is_plain = bool(pairs) and Pairs not in map(type, pairs)
        self.parameters = [pair._parameters for pair in pairs]
        self.hooks = list(chain.from_iterable(map(hooks_of, pairs)))
        if self.is_plain:
            group.members.append(weakref.ref(self))

    def output(self, x: Tensor, weight: Weight, bias: Tensor | None, choice: Choice) -> Tensor | None:
        """The output for the input ``x`` as one node of autograd; ``None`` where that is not possible."""
        if not self.is_plain or any(self.hooks) or any(GLOBAL_HOOKS) or choice.is_ambiguous:
            return None
        settings = tuple(map(_settings, self.pairs))
        if settings != self.settings:
            self._set(settings)
        mixture = choice.mixture(self.names, x.device)
        if self.dropout is None or (self.dropout and mixture.slots > 1):
            return None  # each pair has a dropout of its own
        return fuse_mixed(x, weight, bias, self.matrices(), self.scales, mixture, self.dropout, self.copies_now)

    def _set(self, settings: Sequence[tuple[float, float, bool]]) -> None:
        chances = {chance if training else 0.0 for _, chance, training in settings}
        self.scales = tuple(scale for scale, _, _ in settings)
        self.dropout = chances.pop() if len(chances) == 1 else None
        self.settings = settings

    def matrices(self) -> list[Any]:
        """Every A, then every B, as they are now; ``None`` for one that is computed."""
        return [each.get("A") for each in self.parameters] + [each.get("B") for each in self.parameters]

    def copies_now(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> PairCopies:
        """The copies of ``matrices`` in ``dtype``."""
        copies = self.copies
        if (
            copies is None
            or self.was_read
            or (copies.is_overwritten and torch.is_grad_enabled())
            or self.facts != facts_of(matrices, dtype)
        ):
            copies = self.group.copy(self, matrices, dtype)
        self.was_read = True
        if not copies.is_overwritten:
            self.copies = None
        return copies

    def end_of_choice(self) -> None:
        """Drop copies that were made for a forward pass in which the layer was not called."""
        if self.copies is not None and not self.copies.is_overwritten:
            self.copies = None


class MixedLayers(dict[frozenset[str], MixedLayer]):
    """What is known of one layer, by the names that act; a copy of a model knows nothing."""

    def __reduce__(self) -> tuple[type[MixedLayers], tuple[()]]:
        return MixedLayers, ()


def mixed_layer(adapters: Adapters, choice: Choice) -> MixedLayer:
    """What is known of the layer that has these ``adapters``, where those of ``choice`` act."""
    layer = _known(adapters, choice)
    if layer is None:
        _make_groups(choice)
        layer = _known(adapters, choice) or _know(adapters, choice, MixedLayer(adapters, choice.names, CopyGroup()))
    return layer


def _known(adapters: Adapters, choice: Choice) -> MixedLayer | None:
    layer: MixedLayer | None = None if adapters.mixed is None else adapters.mixed.get(choice.names)
    return layer if layer is not None and layer.modules == adapters._modules else None


def _know(adapters: Adapters, choice: Choice, layer: MixedLayer) -> MixedLayer:
    if adapters.mixed is None or len(adapters.mixed) >= MAX_NAMES:
        adapters.mixed = MixedLayers()
    adapters.mixed[choice.names] = layer
    return layer


def _make_groups(choice: Choice) -> None:
    """Let neighbours be copied together, as many as are small enough."""
    group, total = CopyGroup(), 0
    for adapters in choice.linear_layers:
        if _known(adapters, choice) is not None:
            continue
        layer = MixedLayer(adapters, choice.names, group)
        size = sum(matrix.numel() for matrix in layer.matrices() if matrix is not None)
        if total and total + size > MAX_ELEMENTS:
            group, total = CopyGroup(), 0
            layer = MixedLayer(adapters, choice.names, group)
        total += size
        _know(adapters, choice, layer)
