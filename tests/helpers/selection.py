"""Which cases of a table belong to the fast selection, `-m "not slow"`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest


def slow_except(fast: Collection[object], names: Iterable[object]) -> list:
    """Parameters for `pytest.mark.parametrize`: the cases in `fast` run always, the others are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
