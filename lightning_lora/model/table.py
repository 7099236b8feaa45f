"""Text tables of adapted matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.names import folded


@dataclass(frozen=True)
class Row:
    """One adapted matrix.

    Args:
        name: name of the layer, or of the matrix in it.
        kind: class name of the layer.
        shape: ``in -> out``, with the number of experts where there are several.
        r: rank.
        scale: factor in front of ``B A``.
        parameters: number of parameters of A and B together.
        why: the preset or pattern that chose the matrix.
    """

    name: str
    kind: str
    shape: str
    r: int
    scale: float
    parameters: int
    why: str = ""


def row_of(name: str, kind: str, part: WeightPart, weight: Tensor, r: int, scale: float, why: str = "") -> Row:
    """The row of the matrix ``part`` of a layer whose parameter is ``weight``."""
    in_features, out_features = part.features(weight)
    (experts,) = part.stack(weight) or (1,)
    shape = f"{in_features} -> {out_features}"
    described = f"{experts} x {shape}" if part.stacked else shape
    return Row(name, kind, described, r, scale, experts * r * (in_features + out_features), why)


def table(rows: Iterable[Row]) -> list[str]:
    """Aligned lines with a heading; rows that differ only by a number in the name share a line."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (folded(row.name), row.kind, row.shape, str(row.r), f"{row.scale:g}", row.why)
        groups.setdefault(key, []).append(row)
    heading = ("module", "layers", "kind", "in -> out", "r", "scale", "trainable", "by")
    lines = [heading, *(_line(key, group) for key, group in groups.items())]
    if not any(group[0].why for group in groups.values()):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _line(key: tuple[str, ...], group: list[Row]) -> tuple[str, ...]:
    name = key[0] if len(group) > 1 else group[0].name or "(the model itself)"
    size = sum(row.parameters for row in group)
    return (name, str(len(group)), *key[1:5], f"{size:,}", key[5])


def trained_in_full(sizes: Mapping[str, int], words: str) -> list[str]:
    """A line about parameters of the base that train too; names that differ only by a number are summed."""
    sums: dict[str, int] = {}
    for name, size in sizes.items():
        sums[folded(name)] = sums.get(folded(name), 0) + size
    listed = ", ".join(f"{name} ({size:,})" for name, size in list(sums.items())[:6])
    more = f" and {len(sums) - 6} more" if len(sums) > 6 else ""
    return [f"{words}: {listed}{more}"] if sums else []


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
