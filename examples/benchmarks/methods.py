"""Every method of the package on one model: trained parameters, bytes of a checkpoint, time of a step and of a forward.

    python examples/benchmarks/methods.py --out examples/benchmarks/methods

The model has the shapes of all-MiniLM-L6-v2 (22.6 M parameters, 6 blocks of width 384) and random weights, with a mean
over its tokens and a new head, which every method trains too; a batch is 8 texts of 32 tokens. A step is a forward and
a backward pass over one batch, and a step of AdamW. A forward is one of the module as `fit` leaves it: what changes
weights alone is merged into them.

Each window of a row is timed right after a window of full fine-tuning without a callback, and the medians of these
pairs count, so that other work on the machine slows both. `--tiny` tries the script at small shapes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from speed_sections.timing import Step, window
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_lora import (
    AdapterCallback,
    FusionCallback,
    LoRACallback,
    PrefixCallback,
    PromptCallback,
    SubspaceCallback,
    TuneCallback,
    adapt,
)

HEAD = ["head"]
TASKS = ("first", "second")  # of the bottlenecks that are fused
PLAIN = "no callback, full fine-tuning"
FUSION = "fusion of two Pfeiffer bottlenecks"
PACKAGES = ("torch", "lightning", "transformers")


@dataclass(frozen=True)
class Shapes:
    """Sizes of the model and of a batch, and how long is measured.

    Args:
        width: features of a token.
        blocks: of the encoder.
        words: of the vocabulary.
        batch: texts.
        length: tokens of a text.
        pairs: of windows for each row.
    """

    width: int = 384
    blocks: int = 6
    words: int = 30522
    batch: int = 8
    length: int = 32
    pairs: int = 5


TINY = Shapes(width=32, blocks=2, words=50, batch=2, length=5, pairs=2)


class Classifier(LightningModule):
    """An encoder, a mean over its tokens, and a head.

    Args:
        shapes: its sizes.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=shapes.words,
            hidden_size=shapes.width,
            num_hidden_layers=shapes.blocks,
            num_attention_heads=shapes.width // 32,
            intermediate_size=4 * shapes.width,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(shapes.width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def methods(folder: Path) -> dict[str, Callable[[], Callback]]:
    """A callback for each row; ``folder`` has the checkpoints of the bottlenecks for the fusion."""
    fused = {task: str(folder / f"{task}.ckpt") for task in TASKS}
    return {
        "LoRA, r=8, attention": lambda: LoRACallback(r=8, targets="attn", also_train=HEAD),
        "biases (BitFit)": lambda: TuneCallback("bias", also_train=HEAD),
        "norms": lambda: TuneCallback("norm", also_train=HEAD),
        "head (linear probe)": lambda: TuneCallback("head"),
        "all (full fine-tuning)": lambda: TuneCallback("all"),
        "bottlenecks of 16, Houlsby": lambda: AdapterCallback(size=16, placement="houlsby", also_train=HEAD),
        "bottlenecks of 16, Pfeiffer": lambda: AdapterCallback(size=16, placement="pfeiffer", also_train=HEAD),
        "bottlenecks of 16, parallel": lambda: AdapterCallback(size=16, placement="parallel", also_train=HEAD),
        "bottlenecks of 16, block": lambda: AdapterCallback(size=16, placement="block", also_train=HEAD),
        FUSION: lambda: FusionCallback(adapters=fused, also_train=HEAD),
        "prefix of 16": lambda: PrefixCallback(length=16, also_train=HEAD),
        "prompt of 16": lambda: PromptCallback(length=16, also_train=HEAD),
        "deep prompt of 16": lambda: PromptCallback(length=16, deep=True, also_train=HEAD),
        "subspace of 200": lambda: SubspaceCallback(dimension=200, also_train=HEAD),
        "subspace of 200, structured": lambda: SubspaceCallback(dimension=200, structure=True, also_train=HEAD),
    }


@dataclass
class Row:
    """What was measured of one method.

    Args:
        trained: parameters.
        checkpoint: bytes.
        step: milliseconds.
        step_share: of the time of full fine-tuning's step.
        forward: milliseconds.
        forward_share: of the time of the plain module's forward.
    """

    trained: int
    checkpoint: int
    step: float
    step_share: float
    forward: float
    forward_share: float


def measure(make: Callable[[], Callback] | None, shapes: Shapes, folder: Path) -> Row:
    """One row, and the plain module in pairs with it."""
    batch = batch_of(shapes)
    callback = None if make is None else make()
    fitted, checkpoint = fit(callback, shapes, batch, folder)
    live = classifier(shapes)
    if callback is not None:
        adapt(live, callback.config)
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    reference = classifier(shapes)
    step, step_share = in_pairs(training(live, batch), training(reference, batch), shapes.pairs, 1)
    forward, forward_share = in_pairs(inference(fitted, batch), inference(reference, batch), shapes.pairs, 3)
    return Row(sum(p.numel() for p in trained), checkpoint, step, step_share, forward, forward_share)


def classifier(shapes: Shapes) -> Classifier:
    """The same module at every call, as a fusion needs the base that its bottlenecks were trained on."""
    seed_everything(0, verbose=False)
    return Classifier(shapes)


def batch_of(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Random tokens and labels."""
    tokens = torch.randint(0, shapes.words, (shapes.batch, shapes.length))
    return tokens, torch.randint(0, 2, (shapes.batch,))


def fit(
    callback: Callback | None, shapes: Shapes, batch: tuple[Tensor, Tensor], folder: Path
) -> tuple[LightningModule, int]:
    """The module as ``fit`` leaves it, and the bytes of its checkpoint, without the states of the optimizer."""
    module = classifier(shapes)
    files = ModelCheckpoint(folder, filename="{step}", save_weights_only=True, every_n_train_steps=1, save_top_k=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        callbacks=[files] if callback is None else [callback, files],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return module, Path(files.best_model_path).stat().st_size


def training(module: Classifier, batch: tuple[Tensor, Tensor]) -> Step:
    """A step of AdamW on what trains."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def inference(module: LightningModule, batch: tuple[Tensor, Tensor]) -> Step:
    """A forward in eval mode, without gradients."""
    module.eval()

    def step() -> None:
        with torch.no_grad():
            module(batch[0])

    return step


def in_pairs(step: Step, reference: Step, pairs: int, steps: int) -> tuple[float, float]:
    """The median milliseconds of ``step``, and the median of its share of the ``reference`` right before it.

    Args:
        step: what is timed.
        reference: the same of the plain module.
        pairs: how often both are timed.
        steps: of each, every time.
    """
    for warm_up in (reference, step):
        warm_up()
    times = [(window(reference, steps), window(step, steps)) for _ in range(pairs)]
    return statistics.median(own for _, own in times), statistics.median(own / other for other, own in times)


def train_bottlenecks(shapes: Shapes, folder: Path) -> None:
    """Two checkpoints for the fusion."""
    for seed, task in enumerate(TASKS):
        callback = AdapterCallback(size=16, placement="pfeiffer", seed=seed)
        fit(callback, shapes, batch_of(shapes), folder / task)
        [checkpoint] = (folder / task).glob("*.ckpt")
        shutil.move(checkpoint, folder / f"{task}.ckpt")


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    lines = ["| | trained parameters | checkpoint, kB | ms a step | of full's | ms a forward | of the plain's |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        sizes = f"{row.trained:,} | {row.checkpoint / 1e3:,.1f}"
        times = f"{row.step:.0f} | {row.step_share:.2f} | {row.forward:.0f} | {row.forward_share:.2f}"
        lines.append(f"| {name} | {sizes} | {times} |")
    return "\n".join(lines)


def heading() -> str:
    """The hardware and the versions."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    python = f"Python {platform.python_version()}"
    threads = f"CPU of {os.cpu_count()} cores ({platform.machine()}), threads of torch: {torch.get_num_threads()}"
    return ", ".join([threads, python, *versions, str(datetime.date.today())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--only", help="rows whose names have this in them")
    parser.add_argument("--note", default="", help="a sentence about the machine, for the result")
    parser.add_argument("--out", help="write OUT_<date>.md too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*many workers.*|.*treespec.*|.*in eval mode.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    shapes = TINY if options.tiny else Shapes()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        every = {PLAIN: None, **methods(Path(scratch))}
        chosen = {name: make for name, make in every.items() if options.only is None or options.only in name}
        if FUSION in chosen:
            train_bottlenecks(shapes, Path(scratch))
        for index, (name, make) in enumerate(chosen.items()):
            rows[name] = measure(make, shapes, Path(scratch) / str(index))
            print(table({name: rows[name]}).splitlines()[-1], flush=True)
    command = f"`python examples/benchmarks/methods.py {'--tiny' if options.tiny else ''}`".replace(" `", "`")
    text = "\n\n".join(part for part in (heading(), options.note, command, table(rows)) if part) + "\n"
    print(text)
    if options.out is not None:
        Path(f"{options.out}_{datetime.date.today()}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
