"""What a checkpoint records of single frozen parameters: which it holds, and which were set after ``setup``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

WRITTEN = "written"  # frozen parameters that code of the user's writes; the file holds them
LATE = "set_after_setup"  # frozen parameters that a hook set before the first batch; the file does not hold them


def names_in(facts: Any, key: str) -> list[str]:
    """The names under ``key`` in what a checkpoint records of its adapter."""
    recorded = facts.get(key) if isinstance(facts, dict) else None
    return [name for name in recorded if isinstance(name, str)] if isinstance(recorded, list) else []


def how_it_was_set(difference: str, late: Collection[str]) -> str:
    """What to do where a ``difference`` of two bases begins with a parameter that was set ``late``."""
    if not any(difference.startswith(f"`{name}`") for name in late):
        return ""
    return (
        " The run that wrote the file set this parameter after `setup`, by a hook such as `on_fit_start` that only "
        "`fit` calls: set it in `__init__`, `setup` or `configure_model`, to the same values every time."
    )
