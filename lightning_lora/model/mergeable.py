"""Which models cannot take the sum of their weights and their adapters, and why."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_lora.distributed.sharded import is_sharded, is_split
from lightning_lora.layers.adapted import has_added
from lightning_lora.layers.base import LoRALayer, adapted_layers, parameter_of
from lightning_lora.layers.quantized.formats import is_quantized, quantized_modules
from lightning_lora.model.quantized.merge import MergeBase, why_not_plain
from lightning_lora.model.record import packed_layers, record_of
from lightning_lora.names import join

TWO_WAYS = (
    "merge_lora(model, dequantize=True) merges into the dequantized weights, and merge_lora(model, base=PATH) into the "
    "weights in full precision that were quantized."
)


def check_mergeable(model: nn.Module, layers: list[tuple[str, LoRALayer]], into: MergeBase | None) -> None:
    """Raise unless ``layers``, the adapted ones of ``model``, can take the sum.

    Args:
        model: with adapters.
        layers: by name.
        into: what those of them that are quantized are merged into.

    Raises:
        ValueError: naming the first that cannot.
    """
    for name, layer in layers:
        for key in layer.lora.by_weight():
            if parameter_of(layer, key).is_meta:
                raise ValueError(
                    f"`{join(name, key)}` is on the meta device, without values to merge into: load the base first."
                )
    for name in quantized_layers(model) if into is None else ():
        raise ValueError(
            f"`{name}` is quantized, and its few bits cannot hold the sum. {why_not_plain(model) or TWO_WAYS}"
        )
    reason = None if into is None else why_not_plain(model)
    if reason is not None:
        raise ValueError(reason)
    where = unwritable(model)
    if where is not None:
        raise ValueError(
            f"{where} Merge on one device, into the base and from the adapter's file; LoRACallback writes the merged "
            "weights into one at the end of its run."
        )


def check_has_quantized(model: nn.Module, argument: str) -> None:
    """Raise if ``argument``, which is for a quantized base, is given for a model that has none, and had none.

    Raises:
        ValueError: saying what to do.
    """
    if not quantized_modules(model) and not packed_layers(model):
        raise ValueError(
            f"`{argument}` is for a base that is quantized, and no linear layer of this model is. Leave it out: the "
            "weights take the sum as they are."
        )


def quantized_layers(model: nn.Module) -> list[str]:
    """The adapted layers of ``model`` whose weights are quantized and cannot hold the sum."""
    return [name for name, layer in adapted_layers(model) if is_quantized(layer) and has_added(layer)]


def unwritable(model: nn.Module) -> str | None:
    """Why the sum cannot be written into the weights of ``model``, though it can into a file; ``None`` if it can."""
    for name, layer in adapted_layers(model):
        for key in layer.lora.by_weight():
            weight = parameter_of(layer, key)
            if is_split(weight):
                return f"`{join(name, key)}` is in pieces, which FSDP1 or ZeRO 3 made of it, and cannot take the sum."
            if is_sharded(weight) and key in record_of(layer).shared:
                return f"`{join(name, key)}` is tied and sharded: FSDP2 would tie it again after it took the sum."
    return None


def warn_of_shared(layers: list[tuple[str, LoRALayer]]) -> None:
    """Name in a warning each weight of ``layers`` that other modules have too: merged, it is one of its own."""
    for name, layer in layers:
        for key in record_of(layer).shared & layer.lora.by_weight().keys():
            warnings.warn(
                f"`{join(name, key)}` was shared with another module, and merged it is a parameter of its own. A model "
                "into which the merged weights are loaded must not tie the two (`tie_word_embeddings=False` in "
                "transformers).",
                stacklevel=3,
            )
