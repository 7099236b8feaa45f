"""One of several adapters: whether it is there, and taking it off while the others stay."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.adapted import swap_out
from lightning_lora.layers.base import LoRALayer, adapted_layers, has_adapter, remove_adapter
from lightning_lora.layers.registry import adapted_class_for
from lightning_lora.model.hooks import equip
from lightning_lora.model.journal import Journal
from lightning_lora.model.record import configs_of, holders, is_merged, records
from lightning_lora.model.several.strengths import set_strengths, strengths_of
from lightning_lora.model.several.trained_in_addition import release, trained_by
from lightning_lora.names import nearest


def check_name(model: nn.Module, name: str, argument: str = "name") -> None:
    """Raise if no adapter of ``model``, live or merged, has that name.

    Raises:
        ValueError: naming the nearest ones.
    """
    present = list(configs_of(model))
    if not present:
        raise ValueError("The model has no adapters: call `apply_lora` first.")
    if name not in present:
        close = ", ".join(f"`{each}`" for each in nearest(name, present))
        raise ValueError(f"`{argument}` must be the name of an adapter, but got {name!r}. The model has {close}.")


def is_last(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is the only adapter of ``model``.

    Raises:
        ValueError: if it is none.
    """
    check_name(model, name)
    return list(configs_of(model)) == [name]


def drop_adapter(model: nn.Module, name: str, journal: Journal) -> None:
    """Take the adapter ``name`` off ``model``, which has others, as a part of a larger change.

    What trains in addition to it, and to no other adapter, gets its initial values back. Where it alone acted, the
    others act again, fully.

    Raises:
        ValueError: if the adapters are merged, or what gets its values back is partitioned by ZeRO 3.
    """
    if is_merged(model):
        raise ValueError(
            f"The adapters are merged into the model: call `unmerge_lora(model)` first, to remove `{name}` alone."
        )
    trained = trained_by(model, name)
    strengths = strengths_of(model)
    for layer in [layer for _, layer in adapted_layers(model) if has_adapter(layer, name)]:
        _drop_from(layer, name)
    for _, _, record in records(model):
        record.configs.pop(name, None)
        record.adapted_by.pop(name, None)
        record.kept.discard(name)
    release(model, trained - trained_by(model), journal)
    if {each for each, strength in strengths.items() if strength} == {name}:  # else the model would be its base
        set_strengths(model, dict.fromkeys(strengths, 1.0))
    for holder, configs in holders(model):
        equip(holder, *configs)


def _drop_from(layer: LoRALayer, name: str) -> None:
    others = [pair.part for other in layer.lora if other != name for pair in layer.lora.pairs_of(other)]
    if others:
        remove_adapter(layer, name, adapted_class_for(layer, others))
    else:
        swap_out(layer)
