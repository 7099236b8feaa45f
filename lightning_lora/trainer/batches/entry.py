"""The entry of a batch that an argument names: a key of a mapping, an index of a sequence, or an attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def entry_of(batch: Any, key: str | int, argument: str) -> Any:
    """The entry ``key`` of ``batch``.

    Args:
        batch: as the step gets it.
        key: a key, an index, which may be a string of digits as the command line gives it, or an attribute.
        argument: of the callback, for the message.

    Raises:
        ValueError: if there is no such entry.

    Example:
        >>> entry_of({"x": [1.0], "task": [2]}, "task", "segments"), entry_of(([1.0], [2]), 1, "segments")
        ([2], [2])
    """
    for get in (_item, _at_index, _attribute):
        entry = get(batch, key)
        if entry is not None:
            return entry
    raise ValueError(
        f"`{argument}={key!r}` must be an entry of every batch, in training and in evaluation, but the batch is "
        f"{_described(batch)}. Let the dataset give it."
    )


def _item(batch: Any, key: str | int) -> Any:
    return batch.get(key) if isinstance(batch, Mapping) else None


def _at_index(batch: Any, key: str | int) -> Any:
    is_index = isinstance(key, int) or key.isdecimal()
    fits = is_index and isinstance(batch, Sequence) and int(key) < len(batch)
    return batch[int(key)] if fits else None


def _attribute(batch: Any, key: str | int) -> Any:
    if isinstance(key, int) or isinstance(batch, (Mapping, Tensor)):
        return None
    value = getattr(batch, key, None)
    return None if callable(value) else value  # a list has a method `index`


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
