"""Tables and pictures of findings.py, beside the numbers of the LoRA paper."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from austen_runs import Setting, adapter_file, load_base
from paired import Difference, difference
from recorded_runs import Record
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import apply_lora, load_lora_state_dict, remove_lora
from lightning_lora.analysis import AmplificationFactor, SubspaceSimilarity

# Hu et al. 2021, table 5: accuracy of GPT-3 on WikiSQL (± 0.5) and MultiNLI (± 0.1) in %, 18 M parameters each.
PAPER_TABLE_5 = {
    "q": (70.4, 91.0),
    "k": (70.0, 90.8),
    "v": (73.0, 91.0),
    "o": (73.2, 91.3),
    "qk": (71.4, 91.3),
    "qv": (73.7, 91.3),
    "qkvo": (73.7, 91.7),
}
# Table 6: the same by targets and rank.
PAPER_TABLE_6 = {
    "qv": {1: (73.4, 91.3), 2: (73.3, 91.4), 4: (73.7, 91.3), 8: (73.8, 91.6), 64: (73.5, 91.4)},
    "qkvo": {1: (74.1, 91.2), 2: (73.7, 91.7), 4: (74.0, 91.7), 8: (74.0, 91.5), 64: (73.9, 91.4)},
}
# Table 7, the query of layer 48: |U^T W V| in directions of the update, of W and random ones; |W|; |delta|.
PAPER_TABLE_7 = {4: (0.32, 21.67, 0.02, 61.95, 6.91), 64: (1.90, 37.71, 0.33, 61.95, 3.57)}
HEADER = "| matrices | r | parameters | rate | our loss per token | from that of {} | paper: WikiSQL, MultiNLI in % |"
RULE = "|---|---|---|---|---|---|---|"
QUANTITIES = ("update_directions", "weight_directions", "random_directions", "weight_norm", "delta_norm", "factor")


@dataclass(frozen=True)
class Row:
    """What the runs of one choice gave, at the best rate.

    Args:
        setting: the chosen one; of several seeds the first.
        runs: by seed.
        note: on the rate, such as that it is an end of the sweep, or that the sweep was cut.
    """

    setting: Setting
    runs: dict[int, Record]
    note: str

    def losses(self, seeds: Sequence[int]) -> list[list[float]]:
        """Of each seed and held-out window."""
        return [self.runs[seed]["losses"] for seed in seeds]

    @property
    def means(self) -> list[float]:
        """The loss per token of each seed."""
        return [run["loss"] for run in self.runs.values()]

    def against(self, reference: Row) -> Difference:
        """The difference in loss, window by window and seed by seed."""
        seeds = sorted(self.runs.keys() & reference.runs.keys())
        return difference(self.losses(seeds), reference.losses(seeds))


def table_5(rows: Sequence[Row]) -> str:
    """Which matrices at one budget."""
    reference = next((row for row in rows if row.setting.targets == "qv"), rows[0])
    lines = [HEADER.format(letters(reference)), RULE]
    for row in rows:
        paper = "{}, {}".format(*PAPER_TABLE_5[row.setting.targets])
        lines.append(f"| {letters(row)} | {row.setting.r} | {our_columns(row, reference)} | {paper} |")
    return "\n".join(lines)


def table_6(rows: Sequence[Row]) -> str:
    """The rank."""
    lines = [HEADER.format("r=8"), RULE]
    for row in rows:
        same = [other for other in rows if other.setting.targets == row.setting.targets]
        other = next((other for other in same if other.setting.r == 8), row)
        paper = "{}, {}".format(*PAPER_TABLE_6[row.setting.targets][row.setting.r])
        lines.append(f"| {letters(row)} | {row.setting.r} | {our_columns(row, other)} | {paper} |")
    return "\n".join(lines)


def table_of_rates(title: str, by_rate: dict[float, dict[int, float]]) -> str:
    """The loss of some matrices by rank and rate, of one seed."""
    ranks = sorted({r for losses in by_rate.values() for r in losses})
    lines = [f"| {title}, one seed | {' | '.join(f'r={r}' for r in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for rate, losses in sorted(by_rate.items()):
        cells = [f"{losses[r]:.4f}" if r in losses else "" for r in ranks]
        lines.append(f"| rate {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def letters(row: Row) -> str:
    """``q, v``."""
    return ", ".join(row.setting.targets)


def our_columns(row: Row, reference: Row) -> str:
    """Parameters, rate, loss, and the difference from ``reference``; in brackets where it is noise."""
    trained = next(iter(row.runs.values()))["trained"]
    rate = f"{row.setting.rate:g}{f' ({row.note})' if row.note else ''}"
    spread = f" ± {statistics.stdev(row.means):.4f}" if len(row.runs) > 1 else ""
    return f"{trained:,} | {rate} | {statistics.fmean(row.means):.4f}{spread} | {gap(row, reference)}"


def gap(row: Row, reference: Row) -> str:
    """The difference from ``reference`` and its standard error; empty where they have no seed in common."""
    if row is reference or not row.runs.keys() & reference.runs.keys():
        return ""
    found = row.against(reference)
    text = f"{found.mean:+.4f} ± {found.error:.4f}"
    return f"({text})" if found.is_noise else text


# ------------------------------------------------------------------ subspaces


Adapters = dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """The adapters that the figures compare.

    Args:
        small: of a small rank, by one seed.
        large: of the large rank, by another seed: A of one seed starts from the same numbers at every rank.
        again: of the large rank, by the seed of ``small``.
        smallest: of the smallest rank in table 7.
    """

    small: Setting
    large: Setting
    again: Setting
    smallest: Setting


def similarities(kept: Kept, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Equation 4 by layer: two ranks, two seeds, and two random matrices."""
    small, large, again = (
        load_adapters(folder / adapter_file(setting)) for setting in (kept.small, kept.large, kept.again)
    )
    pairs = {
        f"r={kept.small.r} and r={kept.large.r}": (small, large),
        f"r={kept.large.r}, two seeds": (again, large),
        "two random matrices": (random_like(again, 1), random_like(large, 2)),
    }
    found = {}
    for title, pair in pairs.items():
        metric = SubspaceSimilarity()
        metric.update(*pair)
        found[title] = metric.compute()
    return found


def load_adapters(path: Path) -> Adapters:
    """A and B in fp32."""
    return {name: value.float() for name, value in load_file(path).items()}


def random_like(adapters: Adapters, seed: int) -> Adapters:
    """Normal numbers of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in adapters.items()}


def of_projection(grids: dict[str, Tensor], projection: str) -> Tensor:
    """The mean over the layers of one projection."""
    return torch.stack([grid for name, grid in grids.items() if f"{projection}_proj" in name]).mean(0)


def table_of_subspaces(found: dict[str, dict[str, Tensor]]) -> str:
    """Means over layers: the first direction, and all directions of the smaller rank."""
    lines = ["| | i | j | query | value |", "|---|---|---|---|---|"]
    for title, grids in found.items():
        q, v = (of_projection(grids, projection) for projection in "qv")
        for i, j in ((1, 1), (1, 8), (1, q.shape[1]), (q.shape[0], q.shape[1]), (8, 8)):
            if i <= q.shape[0]:
                lines.append(f"| {title} | {i} | {j} | {q[i - 1, j - 1]:.2f} | {v[i - 1, j - 1]:.2f} |")
    return "\n".join(dict.fromkeys(lines))


def draw_subspaces(found: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Heat maps of the mean over layers: a row for query and value, a column for each pair."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(2, len(found), figsize=(9.6, 5.6), layout="constrained")
    largest = max(of_projection(grids, projection).max().item() for grids in found.values() for projection in "qv")
    for column, (title, grids) in enumerate(found.items()):
        for axis, projection, name in zip(axes[:, column], "qv", ("query", "value"), strict=True):
            grid = of_projection(grids, projection).numpy()
            image = axis.imshow(
                grid,
                vmin=0,
                vmax=largest,
                origin="lower",
                aspect="auto",
                cmap="viridis",
                extent=(0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5),
            )
            axis.set_title(f"{title}: {name}", fontsize=10)
            axis.set_xlabel("first j directions", fontsize=9)
            axis.set_ylabel("first i directions", fontsize=9)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(r"$\phi(i, j)$; 1 where one subspace holds the other", fontsize=9)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------ amplification


def amplifications(settings: Sequence[Setting], adapters: Path, data: Path) -> dict[int, dict[str, dict[str, Tensor]]]:
    """Table 7 by rank and layer."""
    model = load_base(data)
    return {setting.r: amplification(model, setting, adapters) for setting in settings}


def amplification(model: nn.Module, setting: Setting, adapters: Path) -> dict[str, dict[str, Tensor]]:
    """The norms of each layer's update and weight."""
    apply_lora(model, setting.config)
    load_lora_state_dict(model, load_adapters(adapters / adapter_file(setting)))
    metric = AmplificationFactor()
    metric.update(model)
    remove_lora(model)
    return metric.compute()


def table_7(found: dict[int, dict[str, dict[str, Tensor]]]) -> str:
    """The query of the middle layer, the mean over layers, and the paper's numbers."""
    lines = [
        "| | r | directions of the update | of W | random | norm of W | norm of the update | amplification |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r, layers in found.items():
        queries = {name: values for name, values in layers.items() if "q_proj" in name}
        middle = list(queries.values())[len(queries) // 2]
        lines.append(norms(f"query of block {len(queries) // 2} of {len(queries)}", r, middle))
        for name, projection in (("query", "q_proj"), ("value", "v_proj")):
            own = [values for layer, values in layers.items() if projection in layer]
            means = {key: torch.stack([values[key] for values in own]).mean() for key in QUANTITIES}
            lines.append(norms(f"{name}, mean of all blocks", r, means))
        if r in PAPER_TABLE_7:
            numbers = [*PAPER_TABLE_7[r], PAPER_TABLE_7[r][4] / PAPER_TABLE_7[r][0]]
            lines.append(norms("paper: query of block 48 of 96", r, dict(zip(QUANTITIES, numbers, strict=True))))
    return "\n".join(lines)


def norms(title: str, r: int, values: dict[str, Tensor | float]) -> str:
    """A row of table 7."""
    return f"| {title} | {r} | " + " | ".join(f"{float(values[key]):.2f}" for key in QUANTITIES) + " |"


# ------------------------------------------------------------------ the picture of the losses


ByRate = dict[float, dict[int, float]]


def draw_losses(budget: Sequence[Row], ranks: dict[str, ByRate], path: Path) -> None:
    """The loss of each choice of matrices at its best rate; and over the rank, a line for each rate.

    Args:
        budget: rows of table 5.
        ranks: by matrices, such as "q, v": the losses of one seed by rate and rank.
        path: of the picture.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 1 + len(ranks), figsize=(11.5, 3.9), layout="constrained")
    draw_budget(axes[0], budget)
    for axis, (title, by_rate) in zip(axes[1:], ranks.items(), strict=True):
        draw_ranks(axis, title, by_rate)
    shown = [loss for by_rate in ranks.values() for losses in by_rate.values() for loss in losses.values()]
    base = next(iter(budget[0].runs.values()))["base_loss"]
    finite = [loss for loss in shown if loss < base]  # what diverged is above the base
    for axis in axes[1:]:
        axis.set_ylim(min(finite) - 0.02, max(finite) + 0.02)
    axes[-1].legend()
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def draw_budget(axis, budget: Sequence[Row]) -> None:
    """Table 5: a line for each choice of matrices."""
    for place, row in enumerate(reversed(budget)):
        axis.plot(row.means, [place] * len(row.means), "o", color="#2e6f95", alpha=0.4, markersize=5)
        axis.plot([statistics.fmean(row.means)], [place], "D", color="#2e6f95", markersize=7)
    axis.set_yticks(range(len(budget)), [f"{letters(row)} (r={row.setting.r})" for row in reversed(budget)])
    trained = next(iter(budget[0].runs.values()))["trained"]
    axis.set_title(f"Which matrices, {trained:,} parameters each", fontsize=10)
    axis.set_xlabel("held-out loss per token, nats (pale: single seeds)")


def draw_ranks(axis, title: str, by_rate: ByRate) -> None:
    """Table 6: the loss over the rank, a line for each rate."""
    import_pyplot()
    from matplotlib import colormaps

    for place, (rate, losses) in enumerate(sorted(by_rate.items())):
        colour = colormaps["viridis"](0.9 * place / max(1, len(by_rate) - 1))
        points = sorted(losses.items())
        axis.plot(*zip(*points, strict=True), marker="osD^"[place % 4], color=colour, label=f"rate {rate:g}")
    ranks = sorted({r for losses in by_rate.values() for r in losses})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(r) for r in ranks])
    axis.set_title(f"Rank of {title} (one seed)", fontsize=10)
    axis.set_xlabel("rank r")
    axis.set_ylabel("held-out loss per token, nats")


def import_pyplot():
    """The part of matplotlib that writes files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9})
    return pyplot
