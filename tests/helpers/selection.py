"""Which cases of a table belong to the fast selection, `-m "not slow"`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest


def slow_except(fast: Collection[object], names: Iterable[object]) -> list:
    """Parameters for `pytest.mark.parametrize`: the cases in `fast` run always, the others are marked slow.

    A tuple is a case of several arguments.
    """
    cases = [(name, name if isinstance(name, tuple) else (name,)) for name in names]
    return [pytest.param(*case, marks=() if name in fast else pytest.mark.slow) for name, case in cases]
