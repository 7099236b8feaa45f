"""The values of a file for an adapter that is in use: its memory, rank and scale stay, so compiled code goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_lora import names
from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapter import Adapter, Pairs
from lightning_lora.peft_format.contents import holders
from lightning_lora.peft_format.layers import PeftPair, adapters_of, keys_of, own_rows
from lightning_lora.peft_format.placement import FileValues


def slot_values(file: FileValues, inner: nn.Module, slot: str) -> dict[str, Tensor]:
    """The values of ``file`` as a state dict of the adapter ``slot`` of ``inner``; zeros where the file has none.

    Raises:
        ValueError: naming the first layer that the slot has no place for.
    """
    layers = {name: (layer, adapters_of(adapters, slot)) for name, layer, adapters in holders(inner, slot)}
    more = next((name for name in file.pairs if name not in layers), None)
    if more is not None:
        raise ValueError(
            f"`{more}` has an adapter in the file and none in `into={slot!r}`, which stays on its layers. Give `name` "
            "in place of `into` to add an adapter."
        )
    state: dict[str, Tensor] = {}
    for name, (layer, own) in layers.items():
        values = _zeros(own)
        if name in file.pairs:
            A, B = (file.pairs[name][key].float() for key in keys_of(layer))
            values = fitted(own, PeftPair(A, B, file.scales[name], keys_of(layer)))
        if isinstance(values, str):
            raise ValueError(f"`{name}` {values}. Give `name` in place of `into={slot!r}` to add an adapter.")
        state |= {names.join(name, f"lora.{slot}.{key}"): value for key, value in values.items()}
    return state


def _zeros(own: Adapter | Pairs) -> Mapping[str, Tensor] | str:
    return {key: torch.zeros(shape_of(parameter)) for key, parameter in own.named_parameters()}


def fitted(own: Adapter | Pairs, pair: PeftPair) -> Mapping[str, Tensor] | str:
    """The values of A and B of each of ``own`` that give the update of ``pair``; or why they cannot.

    A slice of a fused layer gets those columns of B that are not zero in its rows.
    """
    named = list(own.items()) if isinstance(own, Pairs) else [("", own)]
    A, B = pair.A.flatten(1), pair.B.flatten(1)
    values: dict[str, Tensor] = {}
    placed = torch.zeros_like(B)
    for name, adapter in named:
        rows = own_rows(adapter, B)
        used = rows.any(0) if isinstance(own, Pairs) else torch.ones(pair.r, dtype=torch.bool)
        more = adapter.r - int(used.sum())
        if more < 0:
            return f"has rank {int(used.sum())} in the file and only {adapter.r} in the model"
        placed += adapter.part.place_rows(rows, len(B))
        key = f"{name}." if name else ""
        values[f"{key}A"] = pad(A[used], (0, 0, 0, more))
        values[f"{key}B"] = pad(rows[:, used] * (pair.scale / adapter.scale), (0, more))
    return values if torch.equal(placed, B) else "is adapted in rows that the adapters in the model do not change"
