"""What the forward of a layer asks for on the weight's side: the sum of a weight and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.choice import Choice
from lightning_lora.layers.sums.summed_weight import SummedWeight


def summed_weight(layer: LoRALayer, x: Tensor, key: str = "weight") -> Tensor | None:
    """What ``layer`` computes with for the input ``x`` on the weight's side; ``None`` on the activations' side."""
    adapters: Any = layer._modules["lora"]  # reading attributes of a module takes longer
    return summed_by_choice(layer, x, adapters.choice_now(), key) if adapters.sums else None


def summed_by_choice(layer: LoRALayer, x: Tensor, choice: Choice | None, key: str = "weight") -> Tensor | None:
    """As :func:`summed_weight`, where ``choice`` acts now."""
    adapters: Any = layer._modules["lora"]
    summed: SummedWeight | None = adapters.sums.get(key)
    if summed is None:
        return None
    if torch.compiler.is_compiling():
        return _traced(layer, key) if summed.always and adapters.acting is None else None
    if choice is None or choice is adapters.acting.default:
        return summed.read(layer, x)
    chosen = summed.of_choice(choice.full) if choice.full else None
    return None if chosen is None else chosen.read(layer, x)


def summed_weights(layer: LoRALayer, x: Tensor) -> dict[str, Tensor]:
    """The sum of each adapted weight of ``layer`` by its name; an empty dictionary if one is not available."""
    keys = layer.lora.by_weight() if layer.lora.sums else {}
    sums = {key: total for key in keys if (total := summed_weight(layer, x, key)) is not None}
    return sums if len(sums) == len(keys) else {}


def _traced(layer: LoRALayer, key: str) -> Tensor | None:
    """The sum in operations that a compiler traces; ``None`` with dropout, which acts on the input."""
    pairs: Sequence[Adapter] = layer.lora.summed(key) if layer.lora.enabled else ()
    if any(pair.dropout and pair.training for pair in pairs):
        return None
    total: Tensor = getattr(layer, key)
    for pair in pairs:
        total = pair.add_to_weight(total)
    return total
