"""How strongly adapters act as long as no choice is made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_lora.layers.base import adapted_layers
from lightning_lora.model.record import merged_layers


def set_strengths(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let these adapters of ``model`` act with these coefficients by default; 0 lets one rest.

    Args:
        model: a module with live adapters.
        strengths: by the names of adapters; the others keep theirs.
    """
    for _, layer in adapted_layers(model):
        own = {name: strength for name, strength in strengths.items() if name in layer.lora}
        if any(layer.lora.strengths.get(name, 1.0) != strength for name, strength in own.items()):
            layer.lora.strengths = {**layer.lora.strengths, **own}
            layer.lora.prepare_choices()


def strengths_of(model: nn.Module) -> dict[str, float]:
    """The coefficient with which each adapter of ``model``, live or merged, acts by default, by name."""
    live = [layer.lora for _, layer in adapted_layers(model)]
    every = [*live, *(merged.adapters for _, _, merged in merged_layers(model))]
    return {name: c for adapters in every for name, c in adapters.strengths_now().items()}
