"""The table of a section, and its bars: the bound's speed, and never slower than the faster of peft and full."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from speed_sections.bars import at_least, at_most
from speed_sections.rows import BOUND, FULL, PEFT_BF16, PEFT_FP32, Row, Rows, Start, measure
from speed_sections.settings import CUDA, OURS, Settings, Windows


def compare(
    title: str,
    starts: Mapping[str, Start],
    windows: Windows,
    settings: Settings,
    *,
    bar: float,
    aim: float | None = None,
    memory_of: Sequence[str] = (FULL,),
) -> list[str]:
    """Measure the rows and hold this package's against ``bar`` and ``aim``, shares of the bound's speed.

    Args:
        title: of the section, with shapes and ranks.
        starts: what makes a step of each row.
        windows: how long each is measured.
        settings: the options of the call.
        bar: the least share.
        aim: the share that is aimed at.
        memory_of: rows whose peak of memory must not be exceeded.
    """
    rows = measure(starts, windows, settings)
    lines = table(title, rows, settings)
    for name in ours(rows):
        lines.append(at_least(f"{name}, share of the bound's speed", share(rows, name), bar, aim))
        lines += never_slower(rows, name, memory_of)
    return lines


def table(title: str, rows: Rows, settings: Settings) -> list[str]:
    """Each row beside the bound and full fine-tuning; a column that no row has is left out."""
    columns: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        for column, (value, spec) in cells(rows, name, row).items():
            if not math.isnan(value):
                columns.setdefault(column, {})[name] = format(value, spec)
    lines = [*heading(title, settings.small), f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        values = [row.failure] if row.failure else [column.get(name, "") for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return [*lines, ""]


def cells(rows: Rows, name: str, row: Row) -> dict[str, tuple[float, str]]:
    """The value and the format of each column."""
    return {
        "ms": (row.ms, ".2f"),
        "of the bound's speed": (share(rows, name), ".3f"),
        "times full's speed": (against(rows, FULL, name), ".2f"),
        "host ms": (row.host, ".2f"),
        "GPU busy ms": (row.busy, ".2f"),
        "graphs": (row.graphs, ".0f"),
        "peak GiB": (row.peak, ".2f"),
        "weights GiB": (row.weights, ".2f"),
    }


def one_column(title: str, small: bool, unit: str, values: Mapping[str, float]) -> list[str]:
    """A table with one number a row."""
    lines = [*heading(title, small), f"| | {unit} |", "|---|---|"]
    return [*lines, *(f"| {name} | {value:.3f} |" for name, value in values.items()), ""]


def heading(title: str, small: bool) -> list[str]:
    return [f"## {title}{' (small shapes)' if small else ''}", ""]


def share(rows: Rows, name: str) -> float:
    """The share of the bound's speed."""
    return against(rows, BOUND, name)


def against(rows: Rows, reference: str, name: str) -> float:
    """How many times as fast as ``reference`` the row is."""
    return rows[reference].ms / rows[name].ms if reference in rows else float("nan")


def ours(rows: Rows) -> list[str]:
    """The names of this package's rows."""
    return [name for name in rows if name.startswith(OURS)]


def never_slower(rows: Rows, name: str, memory_of: Sequence[str] = (FULL,)) -> list[str]:
    """The bars of every setting: the faster of peft and full fine-tuning, and the memory of each of ``memory_of``."""
    rivals = [rival for rival in (FULL, PEFT_BF16, PEFT_FP32) if rival in rows and not rows[rival].failure]
    lines = []
    if rivals:
        fastest = min(rivals, key=lambda rival: rows[rival].ms)
        lines.append(at_least(f"{name}, speed over that of {fastest}", against(rows, fastest, name), 1.0))
    if CUDA:
        for rival in memory_of:
            lines.append(at_most(f"{name}, peak GiB, as {rival}", rows[name].peak, rows[rival].peak))
    return lines
