"""How the metrics are drawn: values by layer, singular values, and a similarity as a heat map.

Layers that differ by a number alone, as the blocks of a transformer, share a colour and a line of the legend.
matplotlib is an optional dependency and is imported where something is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lora.names import folded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

MOST_KINDS = 8  # lines of a legend
MOST_NAMES = 6  # layers that are named on an axis; more are numbered
WIDE = 15  # the largest of values over the smallest, above which an axis is logarithmic
SIZE = (4.6, 3.0)  # inches: at the width of a column of paper the text is still 7 points
MARKERS = "osD^vP*X"


def new_axes(ax: Axes | None) -> tuple[Figure | SubFigure, Axes]:
    """``ax`` and its figure, or new ones.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if ax is not None:
        return ax.figure, ax
    return import_pyplot().subplots(figsize=SIZE, layout="constrained")  # type: ignore[no-any-return]


def import_pyplot() -> Any:
    """``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Plots are drawn by matplotlib, which is not installed: pip install "lightning-lora[plot]".'
        ) from error
    return pyplot


def draw_by_layer(values: Mapping[str, Tensor], ax: Axes) -> None:
    """One point for each layer, of a stack of matrices the mean; layers of a kind are a line over the blocks."""
    by_kind = kinds(values)
    blocks = _are_blocks(by_kind)
    for kind, members in by_kind.items():
        heights = [float(values[name].double().mean()) for _, name in members]
        places = range(len(members)) if blocks else [place for place, _ in members]
        ax.plot(places, heights, marker=next_marker(ax), markersize=4, linewidth=1, label=kind)
    _scale_by_size(ax, values.values())
    _name_layers(ax, list(values), "block" if blocks else "layer, in the order of the model")
    if len(values) > MOST_NAMES:
        _legend(ax)


def draw_series(series: Mapping[str, Mapping[str, Tensor]], ax: Axes) -> None:
    """Several quantities by layer, a marker for each quantity."""
    for label, values in series.items():
        heights = [float(value.double().mean()) for value in values.values()]
        ax.plot(heights, marker=next_marker(ax), markersize=4, linestyle="none", label=label)
        _name_layers(ax, list(values), "layer, in the order of the model")
    _scale_by_size(ax, [value for values in series.values() for value in values.values()])
    ax.legend(fontsize="small", frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw_spectra(spectra: Mapping[str, Tensor], ax: Axes) -> None:
    """Singular values by their index: the median of the layers of a kind, and the range of them."""
    spectra = {name: s if s.dim() else s.view(1) for name, s in spectra.items()}  # torchmetrics squeezes a single value
    for kind, members in kinds(spectra).items():
        r = max(spectra[name].shape[-1] for _, name in members)
        rows = torch.cat([_filled(spectra[name].double().cpu(), r) for _, name in members])
        index, middle = range(1, r + 1), rows.nanmedian(0).values.tolist()
        (line,) = ax.plot(index, middle, marker=next_marker(ax), markersize=4, linewidth=1, label=kind)
        if len(rows) > 1:
            low, high = rows.nan_to_num(torch.inf).amin(0), rows.nan_to_num(-torch.inf).amax(0)
            ax.fill_between(index, low.tolist(), high.tolist(), color=line.get_color(), alpha=0.15, linewidth=0)
    _scale_by_size(ax, spectra.values())
    ax.set_xlabel("index $i$")
    _number(ax.xaxis)
    _legend(ax)


def draw_grid(grid: Tensor, ax: Axes) -> None:
    """A similarity between 0 and 1 of the first i directions of one side, and the first j of the other."""
    rows, columns = grid.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = ax.imshow(grid.tolist(), vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    _number(ax.xaxis)
    _number(ax.yaxis)
    ax.figure.colorbar(image, ax=ax, label=r"$\phi(i, j)$")


def _filled(values: Tensor, r: int) -> Tensor:
    """Singular values as rows of length ``r``, with NaN where a layer has fewer."""
    rows = values.reshape(-1, values.shape[-1])
    return torch.nn.functional.pad(rows, (0, r - rows.shape[-1]), value=torch.nan)


def kinds(names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """The places and names of layers by a short name of their kind.

    A few layers are each their own kind. If there are too many kinds, those with the same last part are one.

    Example:
        >>> {kind: places for kind, places in kinds(f"blocks.{i}.{n}" for i in range(4) for n in "qv").items()}["v"]
        [(1, 'blocks.0.v'), (3, 'blocks.1.v'), (5, 'blocks.2.v'), (7, 'blocks.3.v')]
    """
    names = list(names)
    short = short_names(names if len(names) <= MOST_NAMES else [folded(name) for name in names])
    if len(set(short)) > MOST_KINDS:
        short = [name.rpartition(".")[2] for name in short]
    if len(set(short)) > MOST_KINDS:
        short = [""] * len(names)
    result: dict[str, list[tuple[int, str]]] = {}
    for place, (kind, name) in enumerate(zip(short, names, strict=True)):
        result.setdefault(kind.replace("$", r"\$"), []).append((place, name))
    return result


def _are_blocks(by_kind: Mapping[str, Sequence[object]]) -> bool:
    """Whether each kind is there once in every one of several blocks."""
    counts = {len(members) for members in by_kind.values()}
    return len(counts) == 1 and counts != {1} and "" not in by_kind


def short_names(names: Sequence[str]) -> list[str]:
    """Each of ``names`` by as many of its last parts as no other name ends with, and not by a number or star alone.

    Example:
        >>> short_names(["a.*.q", "a.*.v", "encoder.out", "decoder.out", "body.0"])
        ['q', 'v', 'encoder.out', 'decoder.out', 'body.0']
    """
    ends: Counter[str] = Counter(end for name in set(names) for end in _ends(name))
    return [next((end for end in _ends(name) if ends[end] == 1 and not _is_number(end)), name) for name in names]


def _is_number(end: str) -> bool:
    head = end.partition(".")[0]
    return head == "*" or head.isdecimal()


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def next_marker(ax: Axes) -> str:
    """A marker that differs from those of the last lines, for a print without colours."""
    markers = cycle(MARKERS)
    for _ in ax.lines:
        next(markers)
    return next(markers)


def _scale_by_size(ax: Axes, values: Iterable[Tensor]) -> None:
    """A logarithmic axis for values of several sizes; zero has no place on one."""
    drawn = torch.cat([value.flatten().double().cpu() for value in values])
    drawn = drawn[drawn.isfinite()]
    if len(drawn) and drawn.min() > 0 and drawn.max() > WIDE * drawn.min():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # 0.2, not 2 x 10^-1
        ax.yaxis.set_minor_formatter(NullFormatter())


def _name_layers(ax: Axes, names: Sequence[str], numbers: str) -> None:
    """Name a few layers on the axis; of more it has ``numbers``."""
    if len(names) <= MOST_NAMES:
        short = [name.replace("$", r"\$") for name in short_names(names)]
        ax.set_xticks(range(len(names)), short, rotation=20, ha="right")
    else:
        ax.set_xlabel(numbers)
        _number(ax.xaxis)


def _number(axis: Axis) -> None:
    """Label an axis by whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _legend(ax: Axes) -> None:
    labels = [label for label in ax.get_legend_handles_labels()[1] if label]
    if labels:
        ax.legend(fontsize="small", frameon=False, ncols=2 if len(labels) > 3 else 1)
