"""Which learning rate for which rank: the loss over the rate with alpha fixed, and with alpha = r.

`python examples/rate_and_rank.py` takes a few minutes on two CPU cores and shows two ranks. `--full` is for a GPU:
ranks 2, 8, 32 and 128 at six rates, twice. The task is that of findings.py: SmolLM2-135M, rounded to 4 bits by its
package, on Jane Austen's novels, with adapters on query and value.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from austen_runs import Setting, Study, data_folder, prepare
from recorded_runs import Record, add_arguments, of_settings, quiet_transformers, run_missing, show, storage_of

ALPHA = 16
FIXED, EQUAL = f"alpha = {ALPHA} for every rank", "alpha = r, a scale of 1"
Losses = dict[int, dict[float, float]]  # by rank and rate


def settings(full: bool, steps: int | None) -> dict[str, list[Setting]]:
    """The runs of both panels."""
    ranks = (2, 8, 32, 128) if full else (2, 32)
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2) if full else (1e-3, 1e-2)
    length = steps or (200 if full else 15)
    return {
        title: [Setting("qv", r, r if title == EQUAL else ALPHA, rate, 0, length) for rate in rates for r in ranks]
        for title in (FIXED, EQUAL)
    }


def losses(panel: Sequence[Setting], records: Sequence[Record]) -> Losses:
    """The loss per token by rank and rate; infinite where a run diverged."""
    found: Losses = {}
    for setting in panel:
        for record in of_settings([setting], records):
            loss = record["loss"]
            found.setdefault(setting.r, {})[setting.rate] = loss if math.isfinite(loss) else math.inf
    return found


def table(panels: dict[str, Losses]) -> str:
    """A row for each rank, a column for each rate."""
    rates = sorted({rate for panel in panels.values() for row in panel.values() for rate in row})
    lines = [f"| | r | {' | '.join(f'rate {rate:g}' for rate in rates)} |", "|---" * (len(rates) + 2) + "|"]
    for title, panel in panels.items():
        for r, row in panel.items():
            lowest = min(row.values()) if len(row) == len(rates) else None
            cells = [cell(row.get(rate), lowest) for rate in rates]
            lines.append(f"| {title} | {r} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(loss: float | None, lowest: float | None) -> str:
    """A loss; the best of a row in bold, where no rate is missing."""
    if loss is None:
        return ""
    return f"**{loss:.4f}**" if loss == lowest else f"{loss:.4f}"


def draw(panels: dict[str, Losses], base: float, path: Path) -> None:
    """The loss over the rate, a line for each rank, a panel for each choice of alpha."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 3.9), sharex=True, sharey=True, layout="constrained")
    lowest = min(min(row.values()) for panel in panels.values() for row in panel.values())
    colours = pyplot.get_cmap("viridis")
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for place, (r, row) in enumerate(panel.items()):
            colour = colours(0.9 * place / max(1, len(panel) - 1))
            axis.plot(list(row), list(row.values()), marker="osD^vP"[place % 6], color=colour, label=f"r = {r}")
        axis.axhline(base, color="grey", linestyle="--", linewidth=1)
        axis.annotate("base", (1, base), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey")
        axis.set(xscale="log", xlabel="learning rate of AdamW")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    margin = 0.1 * (base - lowest)
    axes[0].set(ylabel="held-out loss per token, nats", ylim=(lowest - margin, base + 2 * margin))
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "rate_and_rank")
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.prepare:
        prepare(options.prepare)
        return
    storage, panels = storage_of(options), settings(options.full, options.steps)
    if options.report is None:
        run_missing(
            storage.mine([setting for panel in panels.values() for setting in panel]),
            Study(data_folder(options.data)).run,
            storage,
        )
    if storage.part[1] == 1:
        records = storage.read()
        found = {title: losses(panel, records) for title, panel in panels.items()}
        path = options.report or Path(__file__)
        draw(found, records[0]["base_loss"], path.with_suffix(".png"))
        text = f"The base without adapters has a loss of {records[0]['base_loss']:.4f} per token.\n\n{table(found)}"
        show(text, records, options.report)


if __name__ == "__main__":
    main(sys.argv[1:])
