"""The matrices in which several adapters of a model can be added, whatever layers and slices each of them adapts.

One adapter may have a pair for all of a fused projection, and another one for its query rows alone: their sum then is
an update of the whole matrix. A layer that an adapter does not have counts as zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.names import join
from lightning_lora.ops.combination import stacked
from lightning_lora.ops.low_rank import DeltaFactors


@dataclass(frozen=True)
class CommonMatrix:
    """One matrix of the combination, and what each adapter adds to it.

    Args:
        layer_name: of the layer.
        layer: the layer.
        part: the matrix.
        pairs: of the adapters that act in it, by their names; several where an adapter has a pair for each slice.
    """

    layer_name: str
    layer: LoRALayer
    part: WeightPart
    pairs: Mapping[str, list[Adapter]]

    @property
    def name(self) -> str:
        """The name by which a configuration can mean this matrix alone."""
        return join(self.layer_name, self.part.name) if self.part.name else self.layer_name

    def ranks(self) -> list[int]:
        """The rank of what each adapter adds."""
        return [sum(pair.r for pair in pairs) for pairs in self.pairs.values()]

    def factors(self, adapter: str) -> DeltaFactors:
        """``scale * B`` and A of what the ``adapter`` adds, in fp64; stacks of matrices for experts."""
        return stacked([self._factors_of(pair) for pair in self.pairs[adapter]])

    def _factors_of(self, pair: Adapter) -> DeltaFactors:
        A, B = pair.A.detach().double(), pair.scale * pair.B.detach().double()
        if pair.part.rows is not None and self.part.rows is None:
            B = pair.part.place_rows(B, self.part.full_features(parameter_of(self.layer, self.part.key))[1])
        return B, A


def common_matrices(model: nn.Module, names: Iterable[str]) -> list[CommonMatrix]:
    """The matrices that the adapters ``names`` of ``model`` adapt, in the order of the model."""
    return [matrix for name, layer in adapted_layers(model) for matrix in _in_layer(name, layer, list(names))]


def _in_layer(name: str, layer: LoRALayer, adapters: list[str]) -> list[CommonMatrix]:
    pairs = [(adapter, pair) for adapter in adapters if adapter in layer.lora for pair in layer.lora.pairs_of(adapter)]
    whole = {pair.part.key: pair.part for _, pair in pairs if pair.part.rows is None}
    matrices: dict[WeightPart, dict[str, list[Adapter]]] = {}
    for adapter, pair in pairs:
        part = whole.get(pair.part.key, pair.part)
        matrices.setdefault(part, {}).setdefault(adapter, []).append(pair)
    return [CommonMatrix(name, layer, part, by_adapter) for part, by_adapter in matrices.items()]
