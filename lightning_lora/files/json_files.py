"""JSON from a stranger that must be an object: a configuration, the index of a model, the header of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 100_000_000  # bytes; the index of the largest models has a tenth of that


def read_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file at ``path``.

    Raises:
        ValueError: if it is no JSON object, has a key twice, or is too large to be one of these files.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"`{path}` has {path.stat().st_size:,} bytes, too many for a configuration or an index.")
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"`{path}` is damaged or truncated ({shown(str(error))}): copy or download it again."
        ) from error


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        ValueError: if there is none, or it has a key twice.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, but holds {shown(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{shown(key)} is there twice")
        values[key] = value
    return values


LONGEST_NAME = 1000  # characters
LONGEST = 150  # characters of a value from a file in a message


def is_name(name: object) -> bool:
    """Whether ``name`` from a file can be that of a tensor: messages and tables may then show it as it is."""
    return isinstance(name, str) and name.isprintable() and len(name) <= LONGEST_NAME


def printable(text: str, longest: int = 2 * LONGEST) -> str:
    r"""``text`` from a file for a message: control characters as escapes, cut where it is long.

    Example:
        >>> printable("a\x1b[2J" + "b" * 9, longest=8)
        'a\\x1b[2J...'
    """
    text = text[: longest + 1]
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return f"{text[:longest]}..." if len(text) > longest else text


def shown(value: object) -> str:
    """``value`` from a file in backticks for a message."""
    return f"`{printable(value if isinstance(value, str) else repr(value), LONGEST)}`"
