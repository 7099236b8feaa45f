"""Text tables of adapted matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_lora.foreign import ATTENTION_OUTPUT
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.names import folded

WIDTH = 80  # of a terminal


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
        full_rank: the rank that the matrix can have at most.
        adapter: its name, where there are several.
        trains: whether A and B train, and were not kept from an earlier run.
    """

    name: str
    kind: str
    shape: str
    r: int
    scale: float
    parameters: int
    why: str = ""
    full_rank: int = 0
    adapter: str = ""
    trains: bool = True


def row_of(name: str, kind: str, part: WeightPart, weight: Tensor, r: int, scale: float, why: str = "") -> Row:
    """The row of the matrix ``part`` of a layer whose parameter is ``weight``."""
    in_features, out_features = part.features(weight)
    (experts,) = part.stack(weight) or (1,)
    shape = f"{in_features} -> {out_features}"
    described = f"{experts} x {shape}" if part.stacked else shape
    parameters, full_rank = experts * r * (in_features + out_features), min(in_features, out_features)
    return Row(name, ATTENTION_OUTPUT.get(kind, kind), described, r, scale, parameters, why, full_rank)


def table(rows: Iterable[Row]) -> list[str]:
    """Aligned lines with a heading; rows that differ only by a number in the name share a line.

    Lines of one of several adapters come together. Where they would be wider than a terminal, the names of modules, or
    of all layers, have lines of their own.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (folded(row.name), row.kind, row.shape, str(row.r), f"{row.scale:g}", row.adapter, row.why)
        groups.setdefault(key, []).append(row)
    heading = ("module", "layers", "kind", "in -> out", "r", "scale", "trainable", "adapter", "by")
    order = list(dict.fromkeys(key[5] for key in groups))
    lines = [heading, *(_line(*item) for item in sorted(groups.items(), key=lambda item: order.index(item[0][5])))]
    empty = {column for column in (7, 8) if not any(line[column] for line in lines[1:])}
    lines = [tuple(cell for column, cell in enumerate(line) if column not in empty) for line in lines]
    own_line = [lines[0], *(row for name, *rest in lines[1:] for row in ((name,), ("", *rest)))]
    layouts = [_aligned(layout) for layout in (lines, _by_module(lines), own_line)]
    return next((layout for layout in layouts if max(map(len, layout)) <= WIDTH), layouts[-1])


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    full = [line for line in lines if len(line) > 1]
    widths = [max(len(line[column]) for line in full) for column in range(len(full[0]))]
    return [
        "  " + "  ".join(map(str.ljust, line, widths[: len(line)] if len(line) > 1 else [0])).rstrip() for line in lines
    ]


def _by_module(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines, with the names of layers below those of their modules."""
    heading, *rows = lines
    below, current = [heading], ""
    for name, *columns in rows:
        module, _, leaf = name.rpartition(".")
        if module != current and module:
            below.append((module,))
        current = module
        below.append((f"  {leaf}" if module else leaf, *columns))
    return below


def useless_ranks(rows: Iterable[Row]) -> list[str]:
    """A line about ranks that are higher than a matrix can have."""
    large = [row for row in rows if row.r > row.full_rank]
    if not large:
        return []
    first, more = large[0], f" and {len(large) - 1} more" if len(large) > 1 else ""
    return [
        f"r={first.r} is more than `{first.name}` ({first.shape}){more} can use: any update of it has rank "
        f"{first.full_rank} at most, and A and B are larger than the weight"
    ]


def _line(key: tuple[str, ...], group: list[Row]) -> tuple[str, ...]:
    name = key[0] if len(group) > 1 else group[0].name or "(the model itself)"
    size = sum(row.parameters for row in group if row.trains)
    adapter = key[5] if group[0].trains else f"{key[5]} (kept)"
    return (name, str(len(group)), *key[1:5], f"{size:,}", adapter, key[6])


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
