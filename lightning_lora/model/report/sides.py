"""On which side of the equation layers compute, as a line for people."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.registry import adapted_class_for
from lightning_lora.layers.sums.sizes import MAX_CHECKPOINTED_WORK, MAX_ELEMENTS, MAX_WORK
from lightning_lora.model.sum_groups import has_weight_side, take_too_much_memory
from lightning_lora.names import counted
from lightning_lora.targets.survey import Site

ACTIVATIONS, WEIGHTS = "W0 x + scale B (A x)", "(W0 + scale B A) x"


def side_remark(sites: Sequence[Site], compute: str, dropout: float) -> str:
    """Which side the layers of ``sites`` take: of ``"auto"``, up to how many rows of input the weight's side.

    A row is one vector of the input: a token, or a position of an image.
    """
    if compute == "activations" or dropout:
        return f"Layers compute {ACTIVATIONS}{', as dropout needs' if compute != 'activations' else ''}."
    summed = [site for site in sites if has_weight_side(adapted_class_for(site.module, site.parts))]
    sizes = [_size(site) for site in summed]
    count = len(sites) - len(sizes)
    others = f"\n`compute` has no effect on {count} of {counted(len(sites), 'layer')}." if count else ""
    if compute == "weights":
        return f"Layers compute {WEIGHTS}.{others}"
    if take_too_much_memory(weight for site in summed for weight in _weights(site)):
        return f"Layers compute {ACTIVATIONS}: the sums of all weights would take too much memory.{others}"
    rows = sorted({0 if size > MAX_ELEMENTS else MAX_WORK // max(1, size) for size in sizes})
    if not rows or not rows[-1]:
        return f"Layers compute {ACTIVATIONS}.{others}"
    more = "" if len(rows) == 1 else f" ({rows[-1]:,} for the smallest weight)"
    factor = MAX_CHECKPOINTED_WORK / MAX_WORK
    limit = f"for inputs of up to {rows[0]:,} rows{more},\n{factor:g} times as many under activation checkpointing,"
    return f"On a GPU layers compute {WEIGHTS} {limit} otherwise {ACTIVATIONS}.{others}"


def _size(site: Site) -> int:
    return max(weight.numel() for weight in _weights(site))


def _weights(site: Site) -> list[Tensor]:
    return [parameter_of(site.module, key) for key in dict.fromkeys(part.key for part in site.parts)]
