"""The low-rank terms of one call of a layer: which pairs act, for which samples, with which coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.ops.linear import Coefficient
from lightning_lora.ops.mixture import Mixture

Terms = list[tuple[Adapter, Coefficient]]


@dataclass(frozen=True)
class MixedTerms:
    """Pairs of several adapters, each of which acts on some of the samples.

    Args:
        pairs: of each adapter.
        mixture: which samples use which adapter.
        shape: that of coefficients which broadcast with ``A x`` of all samples.
        dim: the dimension of the samples.
    """

    pairs: Sequence[Sequence[Adapter]]
    mixture: Mixture
    shape: Sequence[int]
    dim: int

    def for_all_samples(self, dtype: torch.dtype) -> Terms:
        """The same terms where the rows of an input are not the samples: 0 for samples that do not use a pair."""
        columns = [column.view(*self.shape) for column in self.mixture.of_samples(dtype).unbind(2)]
        return [(pair, column) for pairs, column in zip(self.pairs, columns, strict=True) for pair in pairs]

    def add_to(self, y: Tensor, inputs: Sequence[Tensor | None], *others: Any) -> Tensor:
        """As :func:`add_terms`. A pair is called once, with the rows of its samples.

        So it costs what its samples cost, and values that are not finite stay in the samples that use them.
        """
        for wave in self.mixture.waves(torch.promote_types(y.dtype, torch.float32)):
            parts = []
            for adapter, rows, factor in wave.users:
                part = y.index_select(self.dim, rows)
                chosen = [x if x is None else x.index_select(self.dim, rows) for x in inputs]
                c = factor.view(-1, *self.shape[1:]) if isinstance(factor, Tensor) else factor
                for pair in self.pairs[adapter]:
                    part = pair(part, *chosen, *others, coefficient=c)
                parts.append(part)
            y = wave.put(y, self.dim, parts)
        return y


def add_terms(y: Tensor, terms: Terms | MixedTerms, inputs: Sequence[Tensor | None], *others: Any) -> Tensor:
    """The base output plus the terms.

    Args:
        y: base output of a layer.
        terms: that act in this call.
        inputs: of the layer, which have the dimension of the samples.
        others: what the pairs are called with in addition.
    """
    if isinstance(terms, MixedTerms):
        return terms.add_to(y, inputs, *others)
    for pair, coefficient in terms:
        y = pair(y, *inputs, *others, coefficient=coefficient)
    return y


def of_part(terms: Terms | MixedTerms, name: str) -> Terms | MixedTerms:
    """The terms of the pairs that adapt the matrix ``name`` of a layer."""
    if isinstance(terms, MixedTerms):
        return replace(terms, pairs=[[pair for pair in pairs if pair.part.name == name] for pairs in terms.pairs])
    return [(pair, coefficient) for pair, coefficient in terms if pair.part.name == name]
