"""The adapters of one layer by name, and which of them act in a call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.layers.choice import (
    Acting,
    Choice,
    Weights,
    default_table,
    traced_coefficient,
    traced_coefficient_of_batch,
)
from lightning_lora.layers.mixed.terms import MixedTerms, Terms
from lightning_lora.ops.linear import Coefficient


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name; if ``enabled`` is false the layer returns the base output.

    Attributes:
        strengths: coefficients other than 1 of adapters, as long as no choice is made; 0 for one that rests.
        acting: the choices of each thread; ``None`` as long as none was made, and every adapter acts fully.
        sums: a SummedWeight by the name of its parameter.
        mixed: a MixedLayer by the names that act in it, of a linear layer that computed with a mixed batch.
    """

    enabled: bool = True
    strengths: Mapping[str, float] = MappingProxyType({})
    acting: Acting | None = None
    sums: Mapping[str, Any] = MappingProxyType({})
    mixed: MutableMapping[frozenset[str], Any] | None = None

    def all_pairs(self) -> list[Adapter]:
        """The pairs of every adapter."""
        pairs: list[Adapter] = []
        for name in self._modules:
            pairs += self.pairs_of(name)
        return pairs

    def pairs_of(self, name: str) -> list[Adapter]:
        """The pairs of the adapter ``name``: one, or one for each matrix of the layer."""
        module: Any = self._modules[name]
        return [pair for _, pair in module.items()] if type(module) is Pairs else [module]

    def active_pairs(self) -> list[Adapter]:
        """The pairs that act in some sample now: none while disabled."""
        if not self.enabled:
            return []
        if self.acting is not None:
            return [pair for pair, _ in self._chosen(self.choice_now())]
        modules: Any = self._modules
        if len(modules) == 1:  # as in most forwards
            (pair,) = modules.values()
            if type(pair) is not Pairs:
                return [pair]
        return self.all_pairs()

    def choice_now(self) -> Choice | None:
        """What acts now; ``None`` if every adapter does, fully."""
        return None if self.acting is None or torch.compiler.is_compiling() else self.acting.now()

    def has_samples(self) -> bool:
        """Whether the choice is a list, with an entry for each sample; under a compiler, whether it may become one."""
        if self.acting is None or torch.compiler.is_compiling():
            return self.acting is not None
        choice = self.acting.now()
        return choice is not None and choice.size is not None

    def terms(self, x: Tensor, extra: int = 0, dim: int = 0, size: int | None = None) -> Terms | MixedTerms:
        """The pairs that act on the input ``x``, each with its coefficient.

        Args:
            x: the input of the layer.
            extra: by how many dimensions ``A x`` has more than ``x``.
            dim: the dimension of the samples.
            size: the number of samples, where no dimension of ``x`` has it; that of ``A x`` does.

        Raises:
            ValueError: if samples use different adapters, and ``x`` has another number of samples.
        """
        if self.acting is None or not self.enabled:
            return [(pair, None) for pair in self.active_pairs()]
        if size is None:
            size = x.shape[dim] if x.dim() + extra > 1 + dim else 1
        shape = (size, *[1] * (x.dim() + extra - 1 - dim))
        if torch.compiler.is_compiling():
            return self._traced(shape)
        choice = self.acting.now()
        if choice is None:
            return [(pair, None) for pair in self.all_pairs()]
        names = [name for name in self._modules if name in choice.names]
        if names or not choice.names:
            choice.check_batch(x, size, dim, self)
        if choice.is_uniform or not names:
            return self._chosen(choice)
        mixture = choice.mixture(tuple(names), x.device)
        return MixedTerms([self.pairs_of(name) for name in names], mixture, shape, dim)

    def terms_of_weight(self) -> Terms:
        """The pairs that act now, each with its coefficient, in a layer that acts by its weight.

        Raises:
            ValueError: if the samples of the batch use different adapters.
        """
        if self.acting is None or not self.enabled:
            return [(pair, None) for pair in self.active_pairs()]
        if torch.compiler.is_compiling():
            return self._traced(())
        choice = self.acting.now()
        if choice is not None and choice.names & self._modules.keys():
            choice.check_uniform(self)
        return self._chosen(choice)

    def _chosen(self, choice: Choice | None) -> Terms:
        if choice is None:
            return [(pair, None) for pair in self.all_pairs()]
        weights = {name: choice.weight_of(name) for name in self._modules if name in choice.names}
        return [(pair, None if c == 1 else c) for name, c in weights.items() for pair in self.pairs_of(name)]

    def _traced(self, shape: tuple[int, ...]) -> Terms:
        """Every pair, with coefficients from the table, so that compiled code serves every choice."""
        assert self.acting is not None
        table = self.acting.table
        terms: Terms = []
        for column, name in enumerate(self._modules):
            c: Coefficient = self.strengths.get(name)  # a copy has no table until a choice is made
            if table is not None:
                of_samples = traced_coefficient(table, column, shape[0]).view(shape) if shape else None
                c = traced_coefficient_of_batch(table, column) if of_samples is None else of_samples
            terms += [(pair, c) for pair in self.pairs_of(name)]
        return terms

    def by_weight(self) -> dict[str, list[Adapter]]:
        """All pairs, by the name of the parameter that they adapt."""
        pairs: dict[str, list[Adapter]] = {}
        for adapter in self.all_pairs():
            pairs.setdefault(adapter.part.key, []).append(adapter)
        return pairs

    def summed(self, key: str, names: frozenset[str] | None = None) -> list[Adapter]:
        """The pairs whose sum with the parameter ``key`` acts without a choice; none if one acts in part.

        Args:
            key: the name of the parameter.
            names: the adapters that act by a choice, fully.
        """
        if names is not None:
            chosen = [pair for name in self._modules if name in names for pair in self.pairs_of(name)]
            return [pair for pair in chosen if pair.part.key == key]
        if self.acting is None:
            return [pair for pair in self.all_pairs() if pair.part.key == key]
        strengths = self.strengths_now()
        if set(strengths.values()) - {0.0, 1.0}:
            return []
        acting = [pair for name, strength in strengths.items() if strength for pair in self.pairs_of(name)]
        return [pair for pair in acting if pair.part.key == key]

    def to_merge(self, factors: Weights | None = None) -> dict[str, list[Adapter]]:
        """The pairs whose sum is merged into each parameter, by its name.

        Args:
            factors: of the updates, by the names of adapters, none of those that are not in it; ``None`` for what acts
                as long as no choice is made. A pair with a factor other than 1 is a copy with another scale.
        """
        factors = self.strengths_now() if factors is None else factors
        pairs: dict[str, list[Adapter]] = {}
        for name in self._modules:
            for pair in self.pairs_of(name) if factors.get(name, 0.0) else ():
                pairs.setdefault(pair.part.key, []).append(_scaled(pair, factors[name]))
        return pairs

    def strengths_now(self) -> dict[str, float]:
        """The coefficient of each adapter as long as no choice is made."""
        return {name: self.strengths.get(name, 1.0) for name in self._modules}

    def prepare_choices(self) -> None:
        """Called when adapters came or went, when strengths changed, and before the first choice."""
        strengths, device = self.strengths_now(), self.device()
        default = Choice([strengths]) if set(strengths.values()) - {1.0} else None
        table = None if device is None else default_table(strengths, device)
        # One operation, as two threads may make their first choices at once. An interrupt could leave a lock closed.
        acting = vars(self).setdefault("acting", Acting(default, table))
        acting.set_default(default, table)
        acting.make_table(self._modules, self.device)
        for summed in self.sums.values():
            summed.forget_choices()
        self.mixed = None

    def begin(self, choice: Choice) -> None:
        """Let ``choice`` hold in this thread."""
        if self.acting is None:
            self.prepare_choices()
        assert self.acting is not None
        self.acting.begin(choice)
        self.acting.make_table(self._modules, self.device)

    def end(self, choice: Choice) -> None:
        """Let ``choice`` hold no longer."""
        if self.acting is not None:
            self.acting.end(choice)
            self.acting.make_table(self._modules, self.device)
        for summed in self.sums.values() if choice.full else ():
            summed.group.end_of_choice(choice.full)
        layer = None if self.mixed is None else self.mixed.get(choice.names)
        if layer is not None:
            layer.end_of_choice()

    def device(self) -> torch.device | None:
        """The device of A and B; ``None`` where they have no values."""
        name = next(iter(self._modules), None)
        device = None if name is None else self.pairs_of(name)[0].A.device
        return None if device is None or device.type == "meta" else device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapters:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mixed = None  # copies of A and B where they were
        device = self.device()
        if self.acting is not None and device is not None:
            self.acting.set_default(self.acting.default, default_table(self.strengths_now(), device))
            self.acting.make_table(self._modules, self.device)
        return self


def _scaled(pair: Adapter, factor: float) -> Adapter:
    if factor == 1:
        return pair
    changed = copy(pair)
    changed.scale = factor * pair.scale
    return changed
