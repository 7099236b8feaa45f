"""Rows of adapted matrices as text, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_lora.layers.weight_view import Part
from lightning_lora.names import folded


@dataclass(frozen=True)
class Row:
    """One adapted matrix.

    Args:
        name: of the layer, or of the matrix in it.
        kind: the layer's class.
        shape: ``in -> out``, of each expert's where there are several.
        r: rank.
        scale: factor in front of ``B A``.
        parameters: how many A and B have together.
        why: what chose it.
    """

    name: str
    kind: str
    shape: str
    r: int
    scale: float
    parameters: int
    why: str = ""


def row_of(name: str, kind: str, part: Part, weight: Tensor, r: int, scale: float, why: str = "") -> Row:
    """The row of the matrix ``part`` of a layer, whose parameter is ``weight``."""
    in_features, out_features = part.features(weight)
    (experts,) = part.stack(weight) or (1,)
    shape = f"{in_features} -> {out_features}"
    described = f"{experts} x {shape}" if part.stacked else shape
    return Row(name, kind, described, r, scale, experts * r * (in_features + out_features), why)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines with a head; rows that differ only by a number in the name share one."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (folded(row.name), row.kind, row.shape, str(row.r), f"{row.scale:g}", row.why)
        together.setdefault(key, []).append(row)
    head = ("module", "layers", "kind", "in -> out", "r", "scale", "trainable", "by")
    lines = [head, *(_line(key, same) for key, same in together.items())]
    shown = [line if any(row.why for row in map(_first, together.values())) else line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in shown) for column in range(len(shown[0]))]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in shown]


def _first(rows: list[Row]) -> Row:
    return rows[0]


def _line(key: tuple[str, ...], same: list[Row]) -> tuple[str, ...]:
    name = key[0] if len(same) > 1 else same[0].name or "(the model itself)"
    size = sum(row.parameters for row in same)
    return (name, str(len(same)), *key[1:5], f"{size:,}", key[5])


def beside(sizes: Mapping[str, int], words: str) -> list[str]:
    """A line about parameters of the base that train too; those that differ by a number are one."""
    together: dict[str, int] = {}
    for name, size in sizes.items():
        together[folded(name)] = together.get(folded(name), 0) + size
    listed = ", ".join(f"{name} ({size:,})" for name, size in list(together.items())[:6])
    more = f" and {len(together) - 6} more" if len(together) > 6 else ""
    return [f"{words}: {listed}{more}"] if together else []


def bytes_text(size: float) -> str:
    """A number of bytes for people, in powers of 1000.

    Example:
        >>> bytes_text(25_000), bytes_text(13.4e9)
        ('25.0 kB', '13.4 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
