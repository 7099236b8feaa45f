"""How adapters are combined: the checked arguments of the verb, and the rank that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_lora.arguments import check_choice, check_number, check_rank
from lightning_lora.model.several.common_form import CommonMatrix
from lightning_lora.ops.combination import KINDS


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`lightning_lora.combine_adapters`, by their names."""

    weights: Mapping[str, float]
    kind: str
    r: int | None
    density: float
    seed: int

    def rank(self, matrix: CommonMatrix) -> int:
        """The rank of the combination in one matrix."""
        if self.kind == "cat":
            return sum(matrix.ranks())
        return max(matrix.ranks()) if self.r is None else self.r


def checked_recipe(weights: Mapping[str, float], kind: str, r: int | None, density: float, seed: int) -> Recipe:
    """The arguments of :func:`lightning_lora.combine_adapters`, after checks that need no model.

    Raises:
        ValueError: if one is out of its range.
        TypeError: if one has the wrong type.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"`weights` must be a dict from names of adapters to numbers, such as {{'fr': 0.5, 'de': 0.5}}, but got "
            f"{weights!r}."
        )
    if not weights:
        raise ValueError("`weights` must name at least one adapter, but got {}.")
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
        if not math.isfinite(weight):
            raise ValueError(f"`weights[{name!r}]` must be finite, but got {weight}.")
    check_choice("kind", kind, tuple(KINDS))
    check_number("density", density)
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be a share of elements in (0, 1], but got {density}.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"`seed` must be an integer, but got {seed!r}.")
    if r is not None:
        check_rank("r", r)
        if kind == "cat":
            raise ValueError(
                f"`r` must be None with kind='cat', whose rank is the sum of the ranks, but got {r}. Write kind='svd' "
                "for the nearest of that rank."
            )
    return Recipe(weights, kind, r, density, seed)
