"""Whether two results differ: differences of the same items, by the same seeds, and their standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

STANDARD_ERRORS = 2.0  # a difference of more counts as one


@dataclass(frozen=True)
class Difference:
    """The mean of ``first - second`` and its standard error.

    Args:
        mean: over items and seeds.
        error: of the mean. Items and seeds both add to it: another test set would have other items, and another run
            another seed. It is a little too large, as the items' part has some of the seeds' noise in it.
    """

    mean: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference is under two standard errors."""
        return not abs(self.mean) > STANDARD_ERRORS * self.error


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    """Compare item by item and seed by seed, so that hard items and a lucky seed cancel out.

    Args:
        first: a value for each seed and item, such as losses of test reviews.
        second: the same seeds and items in the same order.

    Example:
        >>> difference([[1.0, 2.0], [1.0, 2.0]], [[0.0, 1.5], [0.5, 1.0]])
        Difference(mean=0.75, error=0.0)
    """
    differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    error = math.hypot(_standard_error(differences.mean(0)), _standard_error(differences.mean(1)))
    return Difference(float(differences.mean()), error)


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def names(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
