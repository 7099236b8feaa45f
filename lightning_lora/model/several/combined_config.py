"""The configuration of a combination: from it the same adapter can be made again, in a run or from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.model.record import records
from lightning_lora.names import join


def combined_config(model: nn.Module, sources: Sequence[LoRAConfig], name: str, ranks: Mapping[str, int]) -> LoRAConfig:
    """The configuration of the adapter ``name`` that combines those of ``sources``, with a scale of 1 everywhere.

    Where the sources agree it says what they say, such as a preset. Elsewhere it names layers and parameters one by
    one.

    Args:
        model: the adapted model.
        sources: the configurations of the combined adapters.
        name: of the combination.
        ranks: of the combination by the names of its matrices.
    """
    every = list(ranks.values())
    usual = max(dict.fromkeys(every), key=every.count)
    return LoRAConfig(
        name=name,
        r=usual,
        rank_pattern={exactly(matrix): r for matrix, r in ranks.items() if r != usual} or None,
        **(_agreed(sources, "targets", "exclude") or {"targets": [exactly(matrix) for matrix in ranks]}),
        **(_agreed(sources, "bias", "also_train") or {"also_train": _trained(model)}),
        **_agreed(sources, "dropout"),
    )


def exactly(name: str) -> str:
    """The pattern that matches ``name`` and no other name."""
    return f"re:{re.escape(name) or '()'}"


def _agreed(sources: Sequence[LoRAConfig], *fields: str) -> dict[str, Any]:
    """The values of these ``fields``; none where the sources differ in one of them."""
    first, *others = [{field: getattr(source, field) for field in fields} for source in sources]
    return first if all(other == first for other in others) else {}


def _trained(model: nn.Module) -> list[str] | None:
    """The parameters of the base that train in ``model``."""
    return [exactly(join(name, key)) for name, _, record in records(model) for key in sorted(record.trained)] or None
