"""The updates of a model: each pair (A, B) of an adapter, live or merged, and the frozen weight that it adapts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import (
    fsdp1_units,
    full_parameters,
    full_tensor,
    is_sharded,
    is_split,
    reshard,
)
from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.layers.adapters import Adapters
from lightning_lora.layers.base import adapted_layers, parameter_of
from lightning_lora.layers.quantized.formats import dequantized, stores_codes
from lightning_lora.layers.weight_view import Rows
from lightning_lora.model.merge_layer import value_before_merge
from lightning_lora.model.quantized.packed import weight_before
from lightning_lora.model.record import Merged, PackedLayer, merged_layers, record_of
from lightning_lora.names import join, named_parameters
from lightning_lora.ops.low_rank import DeltaFactors


@dataclass(frozen=True)
class Update:
    """``delta = scale * B A`` of one matrix, or of a stack of them.

    Args:
        name: of the layer, with the name of the matrix if the layer has several.
        module: the layer.
        pair: A and B.
        merged: the merge record of the layer; ``None`` while its adapters are live.
    """

    name: str
    module: nn.Module
    pair: Adapter
    merged: Merged | None = None

    @torch.no_grad()
    def factors(self) -> DeltaFactors:
        """``scale * B``, ``(..., out_features, r)``, and A, ``(..., r, in_features)``, whole and in fp64.

        Every rank must call it if they are sharded.
        """
        A, B = (full_tensor(matrix).detach().double() for matrix in (self.pair.A, self.pair.B))
        return self.pair.scale * B, A

    def matrix(self, weight: Tensor) -> Tensor:
        """The part of the full ``weight`` that the pair adapts, as ``(..., out_features, in_features)``."""
        part = self.pair.part
        stored = weight.flatten(2 if part.stacked else 1)
        matrix = stored.mT if part.transposed else stored
        return matrix if part.rows is None else _rows_of(matrix, part.rows)


def _rows_of(matrix: Tensor, rows: Rows) -> Tensor:
    """The adapted rows in the order that B has them."""
    size = matrix.shape[-2] // rows.blocks
    blocks = matrix.reshape(*matrix.shape[:-2], rows.blocks, size, matrix.shape[-1])
    return blocks[..., rows.start : rows.stop, :].flatten(-3, -2)


def updates_of(model: nn.Module, name: str | None = None) -> list[Update]:
    """The updates of one adapter of ``model``, in the order of its modules.

    Args:
        model: any module with adapters in it, live or merged.
        name: of the adapter; ``None`` is the only one.

    Raises:
        ValueError: if ``model`` has no adapters, none of this name, or several and ``name`` is ``None``.
    """
    live = [(layer_name, layer, layer.lora, None) for layer_name, layer in adapted_layers(model)]
    merged = [(layer_name, layer, record.adapters, record) for layer_name, layer, record in merged_layers(model)]
    layers: list[tuple[str, nn.Module, Adapters, Merged | None]] = [*live, *merged]
    chosen = chosen_name({key for _, _, adapters, _ in layers for key in adapters}, name, type(model).__name__)
    return [
        Update(join(layer_name, key) if key else layer_name or pair.part.key, layer, pair, record)
        for layer_name, layer, adapters, record in layers
        if chosen in adapters
        for key, pair in _pairs(adapters[chosen])
    ]


def chosen_name(known: set[str], name: str | None, owner: str) -> str:
    """The adapter ``name``, or the only one that is ``known`` in ``owner``.

    Raises:
        ValueError: if there is none of this name, or no single one.
    """
    if not known:
        raise ValueError(f"{owner} has no LoRA adapters: call `apply_lora`, or load an adapter, first.")
    names = ", ".join(map(repr, sorted(known)))
    if name is None and len(known) > 1:
        raise ValueError(f"{owner} has several adapters, and one is measured at a time: give `name`, one of {names}.")
    if name is not None and name not in known:
        raise ValueError(f"`name` must be an adapter of {owner}, which has {names}, but got {name!r}.")
    return next(iter(known)) if name is None else name


def _pairs(adapter: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The pairs of one adapter of a layer, by the names of their matrices; an only one has the empty name."""
    if isinstance(adapter, Pairs):
        yield from adapter.items()
    elif isinstance(adapter, Adapter):
        yield adapter.part.name, adapter


@torch.no_grad()
def frozen_matrices(model: nn.Module, updates: list[Update]) -> Iterator[tuple[Update, Tensor]]:
    """Each of the ``updates`` of ``model`` with the matrix that it adapts, without delta; in any order.

    A sharded weight is gathered, and a quantized one dequantized, only during its iteration, once for all of its
    updates. Every rank must iterate to the end.

    Raises:
        ValueError: if a weight is quantized and sharded, or on the meta device, or the value before a merge cannot be
            computed.
    """
    reshard(model)
    by_parameter, in_units = dict[int, list[Update]](), bool(fsdp1_units(model))
    for update in updates:
        _check_readable(update, in_units)
        by_parameter.setdefault(id(parameter_of(update.module, update.pair.part.key)), []).append(update)
    for parameter_id, weight in _weights(model, by_parameter):
        for update in by_parameter[parameter_id]:
            yield update, update.matrix(weight)


def _weights(model: nn.Module, by_parameter: dict[int, list[Update]]) -> Iterator[tuple[int, Tensor]]:
    """The full value before a merge of each parameter, by its ``id``."""
    if fsdp1_units(model):
        id_of = {name: id(parameter) for name, parameter in named_parameters(model)}
        yield from ((id_of[name], weight) for name, weight in full_parameters(model) if id_of[name] in by_parameter)
    else:
        yield from ((parameter_id, _before_merge(updates[0])) for parameter_id, updates in by_parameter.items())


def _before_merge(update: Update) -> Tensor:
    key = update.pair.part.key
    parameter, packed = parameter_of(update.module, key), _packed(update)
    if packed is not None:
        return weight_before(update.module, packed)
    if update.merged is None:
        is_packed = stores_codes(update.module, key)
        return dequantized(update.module) if is_packed else full_tensor(parameter).detach()
    value = value_before_merge(update.module, update.merged, key)
    if value is None:
        raise ValueError(
            f"`{update.name}` is not what the merge left there: its weight was changed, cast or loaded since, so the "
            "weight before the merge is not known. Measure it before that change."
        )
    return _full(value, parameter)


def _full(shard: Tensor, parameter: Tensor) -> Tensor:
    """The full tensor of which this rank has ``shard``, laid out as ``parameter``."""
    if not is_sharded(parameter) or is_sharded(shard):
        return full_tensor(shard).detach()
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        shard,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return full_tensor(sharded)


def _packed(update: Update) -> PackedLayer | None:
    """The layer before its merge, where that was quantized."""
    return None if update.merged is None else record_of(update.module).packed


def _check_readable(update: Update, in_units: bool) -> None:
    key = update.pair.part.key
    parameter = parameter_of(update.module, key)
    in_pieces = in_units or is_sharded(parameter) or is_split(parameter)
    if in_pieces and (_packed(update) is not None or stores_codes(update.module, key)):
        raise ValueError(
            f"`{update.name}` has a quantized weight that is sharded, of which no norm is taken. Measure it on one "
            "device, or use `UpdateSpectrum` and `SubspaceSimilarity`, which read A and B alone."
        )
    if parameter.is_meta:
        raise ValueError(f"`{update.name}` is on the meta device, without values to measure: load the base first.")
