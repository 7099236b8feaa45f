"""The picture of ``lightning-lora inspect --plot``: the norm and the singular values of each layer's update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_lora.cli.inspect import Inspection
from lightning_lora.cli.output import check_free
from lightning_lora.files.atomic import atomic_write
from lightning_lora.names import counted
from lightning_lora.ops.low_rank import DeltaFactors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
SIZE = (7.0, 3.4)  # inches: the width of a page of two columns
DPI = 200
MOST_COLUMNS = 4  # of a legend
LONGEST = 60  # letters of a title


def check_plot(out: Path, overwrite: bool) -> None:
    """Raise if no picture can be written to ``out``, before anything is read.

    Raises:
        ValueError: if its format is another one.
        FileNotFoundError: if its folder does not exist.
        FileExistsError: if there is something and ``overwrite`` is not given, or it is a directory.
    """
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"`--plot` must be a file that ends in {', '.join(FORMATS)}, but got `{out}`.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"`{out.parent}`, the folder of {out.name!r}, is no directory: make it first.")
    check_free(out, overwrite and not out.is_dir())


def write_plot(inspection: Inspection, deltas: Mapping[str, list[DeltaFactors]], out: Path) -> None:
    """Draw what ``inspection`` lists and write it to ``out``.

    Args:
        inspection: of the files.
        deltas: the factors of their updates, by layer.
        out: a file that :func:`check_plot` accepts.

    Raises:
        ValueError: if there are no updates.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not deltas:
        raise ValueError(f"`{inspection.path}` holds no A and B, so there is no update to draw: leave `--plot` out.")
    figure = drawing(inspection, deltas)
    with atomic_write(out) as part:
        figure.savefig(part, format=out.suffix[1:].lower(), dpi=DPI)


def drawing(inspection: Inspection, deltas: Mapping[str, list[DeltaFactors]]) -> Figure:
    """The norms by layer on the left, the singular values on the right, one legend for both."""
    from lightning_lora.analysis.decomposition import singular_values
    from lightning_lora.analysis.plot import draw_by_layer, draw_spectra, import_pyplot

    import_pyplot()  # its error says how to install it
    from matplotlib.figure import Figure

    spectra = {name: torch.stack([singular_values(delta) for delta in each]) for name, each in deltas.items()}
    norms = {name: torch.linalg.vector_norm(values) for name, values in spectra.items()}
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_by_layer(norms, left)
    draw_spectra(spectra, right)
    left.set(title="Norm of each update", ylabel=r"$\|\Delta W\|_F$")
    right.set(title="Spectrum of each update", ylabel=r"singular value $\sigma_i$ of $\Delta W$")
    figure.suptitle(_title(inspection), fontsize="medium")
    _share_legend(figure, left, right)
    return figure


def _share_legend(figure: Figure, left: Axes, right: Axes) -> None:
    """One legend below both, in place of their own."""
    handles, labels = left.get_legend_handles_labels()
    for legend in (left.get_legend(), right.get_legend()):
        if legend is not None:
            legend.remove()
    if any(labels):
        columns = min(len(labels), MOST_COLUMNS)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _title(inspection: Inspection) -> str:
    name = inspection.path if len(inspection.path) <= LONGEST else f"...{inspection.path[-LONGEST:]}"
    ranks = ", ".join(map(str, sorted({layer.r for layer in inspection.layers})))
    unknown = ", without the scale" if any(layer.scale is None for layer in inspection.layers) else ""
    text = f"{name}: {counted(len(inspection.layers), 'layer')}, rank {ranks}{unknown}"
    return text.replace("$", r"\$")
