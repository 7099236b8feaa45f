"""Methods of fine-tuning at one budget of parameters, each at its own best rate: MiniLM on reviews, fresh or rotten.

`python examples/compare_methods.py` takes about five minutes on two CPU cores: one seed, one rate for each method and
few steps. `--full` is for a GPU: five rates a factor of 3 apart and three seeds for each of eleven methods.

The budget is 73,728 parameters, that of LoRA with r=8 on query and value; a new head of 770 trains with every method at
a rate of its own. Biases, norms, a prompt at the input and the head alone have fewer by their nature. The rate of a
method is the one with the smallest loss on the validation set; the test set is not used to choose.

The data and the weights, rounded to fp16, fit into one directory of 50 MB (`--prepare DIR`), for a machine without a
network (`--data DIR`). Results are appended as they come, and a study that was cut is continued.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from paired import Difference, difference, names
from real_data import CACHE, MINILM, fetch, rotten_tomatoes
from recorded_runs import Record, add_arguments, machines, of_settings, run_missing, storage_of
from safetensors.torch import load_file, save_file
from text_classification import ReviewClassifier, Reviews, Watch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lightning_lora import (
    AdapterCallback,
    LoRACallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
)

LORA, PROBE, FULL = "LoRA, r=8 on q and v", "head alone (linear probe)", "full fine-tuning"
HEAD = ["head"]
UNUSED = ["encoder.pooler"]
HEAD_RATE = 5e-3
BUDGET = 73_728
LONGEST = 48  # tokens of a review; longer ones are cut
LENGTH_OF_SUBSPACE = 73_728


@dataclass(frozen=True)
class Method:
    """A callback and the rate around which its sweep lies.

    Args:
        callback: makes it.
        rate: the middle of the sweep.
    """

    callback: Callable[[], Callback]
    rate: float


METHODS = {
    LORA: Method(lambda: LoRACallback(r=8, targets="qv", also_train=HEAD), 3e-3),
    "prefix of 16": Method(lambda: PrefixCallback(length=16, also_train=HEAD), 1e-2),
    "bottlenecks of 8, Houlsby": Method(lambda: AdapterCallback(8, "houlsby", also_train=HEAD), 3e-3),
    "bottlenecks of 16, Pfeiffer": Method(lambda: AdapterCallback(16, "pfeiffer", also_train=HEAD), 3e-3),
    "deep prompt of 32": Method(lambda: PromptCallback(length=32, deep=True, also_train=HEAD), 1e-2),
    "random subspace": Method(lambda: SubspaceCallback(LENGTH_OF_SUBSPACE, also_train=HEAD), 1e-2),
    "biases (BitFit)": Method(lambda: TuneCallback("bias", also_train=HEAD, exclude=UNUSED), 3e-3),
    "norms": Method(lambda: TuneCallback("norm", also_train=HEAD), 3e-3),
    "prompt of 16 at the input": Method(lambda: PromptCallback(length=16, also_train=HEAD), 1e-2),
    PROBE: Method(lambda: TuneCallback("head"), 1e-2),
    FULL: Method(lambda: TuneCallback("all", exclude=UNUSED), 1e-4),
}


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        method: a key of ``METHODS``.
        rate: of what the method trains in the encoder, or of the head where it trains nothing else.
        seed: of the head, of the batches and of what the method adds.
        steps: of the optimizer.
    """

    method: str
    rate: float
    seed: int
    steps: int


def settings(full: bool, steps: int | None) -> list[Setting]:
    """The runs of the study, one seed after the other, so that a study that was cut has whole seeds."""
    exponents = (-2, -1, 0, 1, 2) if full else (0,)
    return [
        Setting(name, sweep_rate(method.rate, exponent), seed, steps or (400 if full else 60))
        for seed in range(3 if full else 1)
        for exponent in sorted(exponents, key=abs)
        for name, method in METHODS.items()
        if full or name != "random subspace"  # a step of it takes three times as long
    ]


def sweep_rate(rate: float, exponent: int) -> float:
    """``rate`` times a power of 3, in the digits 1 and 3, as 1e-3, 3e-3, 1e-2."""
    half_decades = round(2 * math.log10(rate)) + exponent
    return float(f"{1 if half_decades % 2 == 0 else 3}e{half_decades // 2}")


# ------------------------------------------------------------------ data


class Batches:
    """The tokens of all reviews on the device, and batches of them.

    Args:
        folder: of ``prepare``.
        device: that trains.
        share: of the validation and test reviews to use: every ``share``-th.
        size: reviews of a training batch.
    """

    def __init__(self, folder: Path, device: torch.device, share: int, size: int) -> None:
        self.size = size
        stored = load_file(folder / "reviews.safetensors")
        self.parts = {
            part: tuple(stored[f"{part}.{name}"][:: 1 if part == "train" else share].to(device) for name in FIELDS)
            for part in PARTS
        }

    def take(self, part: str, rows: Tensor, longest: int) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of texts and labels, padded to ``longest`` tokens."""
        tokens, lengths, labels = (values[rows] for values in self.parts[part])
        mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
        return {"input_ids": tokens[:, :longest].long(), "attention_mask": mask.long()}, labels.long()

    def training(self, seed: int, steps: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """``steps`` random batches, each of reviews of about the same length."""
        lengths = self.parts["train"][1].cpu()  # ascending
        generator = torch.Generator().manual_seed(seed)
        batches: list[tuple[dict[str, Tensor], Tensor]] = []
        while len(batches) < steps:
            places = torch.arange(len(lengths)) + 320 * torch.rand(len(lengths), generator=generator)
            rows = torch.argsort(places).split(self.size)
            for index in torch.randperm(len(rows), generator=generator):
                batches.append(self.take("train", rows[index], int(lengths[rows[index]].max())))
        return batches[:steps]

    def evaluation(self, part: str) -> list[tuple[dict[str, Tensor], Tensor]]:
        """All reviews of a part, in their order."""
        lengths = self.parts[part][1].cpu()
        return [self.take(part, rows, int(lengths[rows].max())) for rows in torch.arange(len(lengths)).split(128)]


PARTS, FIELDS = ("train", "validation", "test"), ("tokens", "lengths", "labels")


def prepare(folder: Path) -> None:
    """Write the tokens of the reviews, and the weights in fp16, with the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(MINILM)
    reviews = Reviews(str(source), rotten_tomatoes())
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        texts, labels = zip(*getattr(reviews, part), strict=True)
        tokenized = reviews.tokenize(texts)
        tensors[f"{part}.tokens"] = tokenized["input_ids"].to(torch.int16)  # 30,522 words
        tensors[f"{part}.lengths"] = tokenized["attention_mask"].sum(1).to(torch.int16)
        tensors[f"{part}.labels"] = torch.tensor(labels, dtype=torch.uint8)
    save_file(tensors, folder / "reviews.safetensors")
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copy(source / "config.json", folder)


# ------------------------------------------------------------------ one run


def run(setting: Setting, folder: Path, data: Batches, device: torch.device) -> Record:
    """Train once, and measure the loss of every validation and test review."""
    seed_everything(setting.seed, verbose=False)
    rates = {"head_lr": setting.rate} if setting.method == PROBE else {"lr": setting.rate, "head_lr": HEAD_RATE}
    module = ReviewClassifier(str(folder), **rates).float()
    watch = Watch()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=setting.steps,
        callbacks=[watch, METHODS[setting.method].callback()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data.training(setting.seed, setting.steps), batch_size=None))
    module.to(device).eval()  # fit leaves it on the CPU
    losses = {part: losses_of(module, data.evaluation(part)) for part in ("validation", "test")}
    return {
        "trained": watch.trained - sum(parameter.numel() for parameter in module.head.parameters()),
        "step_ms": round(1000 * statistics.median(watch.seconds), 2),
        "validation_loss": statistics.fmean(losses["validation"]),
        "test_losses": [round(loss, 4) for loss in losses["test"]],
    }


@torch.no_grad()
def losses_of(module: ReviewClassifier, batches: list[tuple[dict[str, Tensor], Tensor]]) -> list[float]:
    """The cross entropy of each review."""
    losses = [torch.nn.functional.cross_entropy(module(texts), labels, reduction="none") for texts, labels in batches]
    return torch.cat(losses).tolist()


# ------------------------------------------------------------------ the report


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

    @property
    def validation_loss(self) -> float:
        """The mean over seeds; infinite where a run diverged."""
        mean = statistics.fmean(run["validation_loss"] for run in self.runs.values())
        return mean if math.isfinite(mean) else math.inf

    def losses(self, seeds: Sequence[int]) -> list[list[float]]:
        """Of each seed and test review."""
        return [self.runs[seed]["test_losses"] for seed in seeds]

    def hits(self, seeds: Sequence[int]) -> list[list[float]]:
        """100 for each review that is classified correctly, else 0: their mean is the accuracy in percent."""
        return [[100.0 * (loss < math.log(2)) for loss in losses] for losses in self.losses(seeds)]


def sweeps(records: Sequence[Record]) -> dict[str, list[Row]]:
    """The rates of each method, ascending; those with fewer seeds than others are left out."""
    rows: dict[tuple[str, float], Row] = {}
    for record in records:
        key = record["method"], record["rate"]
        rows.setdefault(key, Row(*key, {})).runs[record["seed"]] = record
    seeds = max(len(row.runs) for row in rows.values())
    whole = sorted((row for row in rows.values() if len(row.runs) == seeds), key=lambda row: row.rate)
    return {name: found for name in METHODS if (found := [row for row in whole if row.method == name])}


def best(sweep: list[Row]) -> Row:
    """The rate with the smallest loss on the validation set."""
    row = min(sweep, key=lambda row: row.validation_loss)
    return Row(row.method, row.rate, row.runs, at_the_end=len(sweep) > 1 and row in (sweep[0], sweep[-1]))


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
        "| | trained parameters | rate | test loss | from LoRA's | accuracy in % | from LoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = sorted(row.runs)
        loss = mean_and_spread([statistics.fmean(losses) for losses in row.losses(seeds)], 4)
        accuracy = mean_and_spread([statistics.fmean(hits) for hits in row.hits(seeds)], 2)
        signs = ("", "") if row is reference else tuple(map(signed, against(row, reference), (4, 2)))
        rate = f"{row.rate:g}{' (end of the sweep)' if row.at_the_end else ''}"
        trained = f"{row.runs[seeds[0]]['trained']:,}"
        lines.append(f"| {row.method} | {trained} | {rate} | {loss} | {signs[0]} | {accuracy} | {signs[1]} |")
    return "\n".join(lines)


def signed(difference: Difference, digits: int) -> str:
    """The difference and its standard error; in brackets where it is noise."""
    text = f"{difference.mean:+.{digits}f} ± {difference.error:.{digits}f}"
    return f"({text})" if difference.is_noise else text


def statement(rows: Sequence[Row]) -> str:
    """Which methods differ from LoRA by more than noise, in a sentence for each measure."""
    reference = next(row for row in rows if row.method == LORA)
    others = [(row.method, *against(row, reference)) for row in rows if row is not reference]
    sentences = []
    for measure, sign, index in (("accuracy", 1, 2), ("loss", -1, 1)):
        groups: dict[str, list[str]] = {"equal to LoRA within noise": [], "better": [], "worse": []}
        for other in others:
            gain = sign * other[index].mean
            kind = "equal to LoRA within noise" if other[index].is_noise else "better" if gain > 0 else "worse"
            groups[kind].append(other[0])
        parts = [f"{kind}: {names(methods) or 'none'}" for kind, methods in groups.items()]
        sentences.append(f"By test {measure} {'; '.join(parts)}.")
    return "\n".join(sentences)


def draw(chosen: Sequence[Row], every: dict[str, list[Row]], path: Path) -> None:
    """The validation loss over the rates, and the test loss at the best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6), width_ratios=[1.25, 1], layout="constrained")
    colours = (*pyplot.get_cmap("tab10").colors, "black")
    styles = dict(zip(METHODS, zip(colours, "osD^vPX<>*h", strict=True), strict=True))
    worst = max(row.validation_loss for row in chosen)
    for name, sweep in every.items():
        colour, marker = styles[name]
        losses = [row.validation_loss for row in sweep]
        left.plot(
            [row.rate for row in sweep],
            losses,
            marker=marker,
            color=colour,
            linewidth=2.4 if name in (LORA, FULL) else 1,
            label=name,
        )
    lowest = min(row.validation_loss for row in chosen)
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss", ylim=(lowest - 0.01, worst + 0.06))
    left.set_title("Each method over its rates", fontsize=10)
    left.grid(alpha=0.25)
    for place, row in enumerate(reversed(chosen)):
        colour, marker = styles[row.method]
        values = [statistics.fmean(losses) for losses in row.losses(sorted(row.runs))]
        right.plot(values, [place] * len(values), marker, color=colour, alpha=0.35, markersize=5)
        right.plot([statistics.fmean(values)], [place], marker, color=colour, markersize=8)
    labels = [f"{row.method}\n{next(iter(row.runs.values()))['trained']:,} parameters" for row in reversed(chosen)]
    right.set_yticks(range(len(chosen)), labels, fontsize=8)
    right.set(xlabel="test loss (pale: single seeds)")
    right.set_title("Each method at its best rate", fontsize=10)
    right.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=150)


def report(records: Sequence[Record], path: Path | None, picture: Path) -> None:
    """Print the table, draw the picture, and write both into a result file."""
    every = sweeps(records)
    rows = [best(sweep) for sweep in every.values()]
    text = f"{table(rows)}\n\n{statement(rows)}"
    draw(rows, every, picture)
    print(text)
    print(f"losses over the rates: {picture}")
    if path is not None:
        path.write_text(f"{machines(records)}\n\n{text}\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "compare_methods")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="these methods")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*many workers.*|.*treespec.*|.*in eval mode.*|.*no `val_dataloader`.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    set_verbosity_error()
    disable_progress_bar()
    if options.prepare:
        prepare(options.prepare)
        return
    storage = storage_of(options)
    wanted = [
        setting for setting in settings(options.full, options.steps) if setting.method in (options.only or METHODS)
    ]
    if options.report is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = options.data or CACHE / "compare_methods"
        if options.data is None and not (folder / "config.json").exists():
            prepare(folder)
        data = Batches(folder, device, *((1, 32) if options.full else (8, 16)))
        run_missing(storage.mine(wanted), lambda setting: run(setting, folder, data, device), storage)
    records = of_settings(wanted, storage.read())
    if storage.part[1] == 1:
        report(records, options.report, (options.report or Path(__file__)).with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
