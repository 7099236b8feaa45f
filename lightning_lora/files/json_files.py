"""JSON from a stranger that must be an object: a configuration, the index of a model, the header of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 100_000_000  # bytes; the index of the largest models has a tenth of that


def read_object(path: Path) -> dict[str, Any]:
    """What the file at ``path`` holds.

    Raises:
        ValueError: if it is no JSON object, has a key twice, or is too large to be one of these files.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"`{path}` has {path.stat().st_size:,} bytes, too many for a configuration or an index.")
    return object_in(path.read_bytes(), path)


def object_in(text: bytes, path: Path) -> dict[str, Any]:
    """The object in ``text``, which comes from the file at ``path``.

    Raises:
        ValueError: if it is none, or has a key twice.
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{path}` must hold a JSON object, but holds {shown(found)}.")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a file that is not what it was."""
    return ValueError(f"`{path}` is damaged or truncated ({shown(str(reason))}): copy or download it again.")


def shown(value: object) -> str:
    """``value`` for a message, cut where it is long: it comes from the file."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return f"`{text[:150]}...`" if len(text) > 150 else f"`{text}`"
