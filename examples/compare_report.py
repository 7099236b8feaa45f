"""The report of compare_methods.py: a table, what differs from LoRA by more than noise, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paired import Difference, difference, names
from recorded_runs import Record, show

SWEEP_SEED = 0  # chooses the rate
LORA, FULL = "LoRA, r=8 on q and v", "full fine-tuning"  # what the report singles out


@dataclass(frozen=True)
class Row:
    """A method at one rate.

    Args:
        method: its name.
        rate: of the runs.
        runs: by seed.
        at_the_end: whether the rate is the smallest or the largest of the sweep.
    """

    method: str
    rate: float
    runs: dict[int, Record]
    at_the_end: bool = False

    def validation_loss(self) -> float:
        """Of the seed that chooses; infinite where the run diverged."""
        loss: float = self.runs[SWEEP_SEED]["validation_loss"]
        return loss if math.isfinite(loss) else math.inf

    def losses(self, seeds: Sequence[int]) -> list[list[float]]:
        """Of each seed and test review."""
        return [self.runs[seed]["test_losses"] for seed in seeds]

    def hits(self, seeds: Sequence[int]) -> list[list[float]]:
        """100 for each review that is classified correctly, else 0: their mean is the accuracy in percent."""
        return [[100.0 * (loss < math.log(2)) for loss in losses] for losses in self.losses(seeds)]


def sweeps(records: Sequence[Record]) -> dict[str, list[Row]]:
    """The rates of each method, ascending."""
    rows: dict[tuple[str, float], Row] = {}
    for record in records:
        key = record["method"], record["rate"]
        rows.setdefault(key, Row(*key, {})).runs[record["seed"]] = record
    methods = dict.fromkeys(record["method"] for record in records)
    ascending = sorted(rows.values(), key=lambda row: row.rate)
    return {name: [row for row in ascending if row.method == name] for name in methods}


def best(sweep: list[Row]) -> Row:
    """The rate with the smallest validation loss of the seed that chooses, and the runs by the other seeds, if any."""
    tried = [row for row in sweep if SWEEP_SEED in row.runs]
    row = min(tried, key=Row.validation_loss)
    others = {seed: run for seed, run in row.runs.items() if seed != SWEEP_SEED}
    return replace(row, runs=others or row.runs, at_the_end=len(tried) > 1 and row in (tried[0], tried[-1]))


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean over seeds and the standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def against(row: Row, reference: Row) -> tuple[Difference, Difference]:
    """Differences in loss and in accuracy from ``reference``, on the same reviews by the same seeds."""
    seeds = sorted(row.runs.keys() & reference.runs.keys())
    return (
        difference(row.losses(seeds), reference.losses(seeds)),
        difference(row.hits(seeds), reference.hits(seeds)),
    )


def table(rows: Sequence[Row]) -> str:
    """The methods at their best rates, in Markdown."""
    reference = next(row for row in rows if row.method == LORA)
    lines = [
        "| | trained parameters | rate | seeds | test loss | from LoRA's | accuracy in % | from LoRA's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = sorted(row.runs)
        loss = mean_and_spread([statistics.fmean(losses) for losses in row.losses(seeds)], 4)
        accuracy = mean_and_spread([statistics.fmean(hits) for hits in row.hits(seeds)], 2)
        comparable = row is not reference and len(seeds) >= len(reference.runs)
        signs = tuple(map(signed, against(row, reference), (4, 2))) if comparable else ("", "")
        rate = f"{row.rate:g}{' (end of the sweep)' if row.at_the_end else ''}"
        trained = f"{row.runs[seeds[0]]['trained']:,}"
        lines.append(
            f"| {row.method} | {trained} | {rate} | {len(seeds)} | {loss} | {signs[0]} | {accuracy} | {signs[1]} |"
        )
    return "\n".join(lines)


def signed(difference: Difference, digits: int) -> str:
    """The difference and its standard error; in brackets where it is noise."""
    text = f"{difference.mean:+.{digits}f} ± {difference.error:.{digits}f}"
    return f"({text})" if difference.is_noise else text


def statement(rows: Sequence[Row]) -> str:
    """Which methods differ from LoRA by more than noise, in a sentence for each measure."""
    reference = next(row for row in rows if row.method == LORA)
    few = [row.method for row in rows if len(row.runs) < len(reference.runs)]
    others = [(row.method, *against(row, reference)) for row in rows if row is not reference and row.method not in few]
    sentences = []
    for measure, sign, index in (("accuracy", 1, 2), ("loss", -1, 1)):
        groups: dict[str, list[str]] = {"equal to LoRA within noise": [], "better": [], "worse": []}
        for other in others:
            gain = sign * other[index].mean
            kind = "equal to LoRA within noise" if other[index].is_noise else "better" if gain > 0 else "worse"
            groups[kind].append(other[0])
        parts = [f"{kind}: {names(methods) or 'none'}" for kind, methods in groups.items()]
        sentences.append(f"By test {measure} {'; '.join(parts)}.")
    if few:
        sentences.append(f"Fewer seeds than LoRA, so no statement: {names(few)}.")
    return "\n".join(sentences)


def draw(chosen: Sequence[Row], every: dict[str, list[Row]], path: Path) -> None:
    """The validation loss over the rates; the test loss and the accuracy at the best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9})
    figure, axes = pyplot.subplots(1, 3, figsize=(11.5, 4.8), width_ratios=[1.3, 0.8, 0.8], layout="constrained")
    colours = (*pyplot.get_cmap("tab10").colors, "black")
    styles = dict(zip(every, zip(colours, "osD^vPX<>*h", strict=True), strict=False))
    lowest = []
    for name, sweep in every.items():
        colour, marker = styles[name]
        width = 2.4 if name in (LORA, FULL) else 1
        tried = [row for row in sweep if SWEEP_SEED in row.runs]
        heights = [row.validation_loss() for row in tried]
        axes[0].plot([row.rate for row in tried], heights, marker=marker, color=colour, linewidth=width)
        lowest.append(min(heights))
    axes[0].set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    axes[0].set_ylim(min(lowest) - 0.01, max(lowest) + 0.06)
    axes[0].set_title("Each method over its rates (one seed)", fontsize=10)
    axes[0].grid(alpha=0.25)
    draw_seeds(axes[1], chosen, styles, Row.losses)
    draw_seeds(axes[2], chosen, styles, Row.hits)
    trained = [next(iter(row.runs.values()))["trained"] for row in reversed(chosen)]
    labels = [f"{row.method}\n{count:,} parameters" for row, count in zip(reversed(chosen), trained, strict=True)]
    axes[1].set_yticks(range(len(chosen)), labels, fontsize=8)
    axes[1].set_xlabel("test loss")
    axes[1].set_title("At the best rate (pale: single seeds)", fontsize=10)
    axes[2].set_yticks(range(len(chosen)), [""] * len(chosen))
    axes[2].set_xlabel("test accuracy in %")
    figure.savefig(path, dpi=150)


def draw_seeds(axis, chosen: Sequence[Row], styles: dict, measure: Callable) -> None:
    """A line for each method: its seeds, and their mean."""
    for place, row in enumerate(reversed(chosen)):
        colour, marker = styles[row.method]
        values = [statistics.fmean(items) for items in measure(row, sorted(row.runs))]
        axis.plot(values, [place] * len(values), marker, color=colour, alpha=0.35, markersize=5)
        axis.plot([statistics.fmean(values)], [place], marker, color=colour, markersize=8)
    axis.grid(alpha=0.25, axis="x")


def report(records: Sequence[Record], path: Path | None, picture: Path) -> None:
    """Print the table, draw the picture, and write both into a result file."""
    every = sweeps(records)
    rows = [best(sweep) for sweep in every.values()]
    text = f"{table(rows)}\n\n{statement(rows)}"
    draw(rows, every, picture)
    show(text, records, path)
    print(f"losses over the rates: {picture}")
