"""Methods of fine-tuning at one budget of parameters, each at its own best rate: MiniLM on reviews, fresh or rotten.

`python examples/compare_methods.py` takes about five minutes on two CPU cores: one seed, one rate for each method and
few steps. `--full` is for a GPU: of each of ten methods five rates a factor of 3 apart by one seed, and the best of
them by four others, which are reported.

The budget is 73,728 parameters, that of LoRA with r=8 on query and value; a new head of 770 trains with every method at
a rate of its own. Biases, norms, a prompt at the input and the head alone have fewer by their nature. The rate of a
method is the one with the smallest loss on the validation set; the test set is not used to choose.

The data and the weights, rounded to fp16, fit into one directory of 50 MB (`--prepare DIR`), for a machine without a
network (`--data DIR`). Results are appended as they come, and a study that was cut is continued.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compare_report import FULL, LORA, SWEEP_SEED, report
from lightning.pytorch import Callback, Trainer, seed_everything
from real_data import CACHE, MINILM, fetch, rotten_tomatoes
from recorded_runs import (
    Record,
    Storage,
    add_arguments,
    of_settings,
    quiet_lightning,
    quiet_transformers,
    run_missing,
    storage_of,
)
from safetensors.torch import load_file, save_file
from text_classification import ReviewClassifier, Reviews, Watch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterCallback,
    LoRACallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
)

PROBE = "head alone (linear probe)"
SLOW = "random subspace"  # a step takes 30 times as long as one of LoRA on a GPU, and 7 times on a CPU
HEAD = ["head"]
UNUSED = ["encoder.pooler"]
HEAD_RATE = 5e-3
SEEDS = (1, 2, 3, 4)


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
    SLOW: Method(lambda: SubspaceCallback(73_728, also_train=HEAD), 1e-2),
    "biases (BitFit)": Method(lambda: TuneCallback("bias", also_train=HEAD, exclude=UNUSED), 3e-3),
    "norms": Method(lambda: TuneCallback("norm", also_train=HEAD), 3e-3),
    "prompt of 16 at the input": Method(lambda: PromptCallback(length=16, also_train=HEAD), 3e-2),
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


def sweep(method: str, full: bool, steps: int | None) -> list[Setting]:
    """The runs of one seed that choose the rate of a method, the middle of the sweep first."""
    length = steps or (400 if full else 60)
    exponents = (0, -1, 1, -2, 2) if full else (0,)
    rates = [sweep_rate(METHODS[method].rate, exponent) for exponent in exponents]
    return [Setting(method, rate, SWEEP_SEED, length) for rate in rates]


def repeats(tried: Sequence[Setting], records: Sequence[Record]) -> list[Setting]:
    """The runs that are reported: the rate with the smallest validation loss, by seeds that had no part in the choice.

    Args:
        tried: the sweep of a method.
        records: have its results; a rate that diverged or was not run is not chosen.
    """
    losses = {record["rate"]: record["validation_loss"] for record in of_settings(tried, records)}
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return [replace(tried[0], rate=min(finite, key=finite.__getitem__), seed=seed) for seed in SEEDS] if finite else []


def sweep_rate(rate: float, exponent: int) -> float:
    """``rate`` times a power of 3, in the digits 1 and 3, as 1e-3, 3e-3, 1e-2."""
    half_decades = round(2 * math.log10(rate)) + exponent
    return float(f"{1 if half_decades % 2 == 0 else 3}e{half_decades // 2}")


# ------------------------------------------------------------------ data


PARTS, FIELDS = ("train", "validation", "test"), ("tokens", "lengths", "labels")


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


def make_runs(
    sweeps: Sequence[Sequence[Setting]], run_one: Callable[[Setting], Record], storage: Storage, full: bool
) -> None:
    """The sweeps of all methods, then the repeats, so that a study that was cut has whole sweeps."""
    run_missing([setting for tried in sweeps for setting in tried], run_one, storage)
    if full:
        made = storage.read()
        chosen = [setting for tried in sweeps for setting in repeats(tried, made)]
        run_missing(sorted(chosen, key=lambda setting: setting.seed), run_one, storage)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "compare_methods")
    parser.add_argument("--only", nargs="*", choices=METHODS, help=f"these methods (default: all but the {SLOW})")
    options = parser.parse_args(arguments)
    quiet_lightning()
    quiet_transformers()
    if options.prepare:
        prepare(options.prepare)
        return
    storage, full = storage_of(options), options.full
    every = {name: sweep(name, full, options.steps) for name in METHODS}
    if options.report is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = options.data or CACHE / "compare_methods"
        if options.data is None and not (folder / "config.json").exists():
            prepare(folder)
        data = Batches(folder, device, *((1, 32) if full else (8, 16)))
        mine = storage.mine([name for name in METHODS if name in (options.only or METHODS.keys() - {SLOW})])
        make_runs([every[name] for name in mine], lambda setting: run(setting, folder, data, device), storage, full)
    if storage.part[1] == 1:
        made = storage.read()
        wanted = [setting for tried in every.values() for setting in (*tried, *(repeats(tried, made) if full else ()))]
        report(of_settings(wanted, made), options.report, (options.report or Path(__file__)).with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
