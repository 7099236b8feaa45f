"""What LoRA saves: time of a step, memory and size of checkpoints beside full fine-tuning, and the published figures.

    python examples/benchmarks/costs.py --out costs.jsonl       # on a GPU; appends each row when it is measured
    python examples/benchmarks/costs.py --report costs.jsonl    # the tables in Markdown
    python examples/benchmarks/costs.py --tiny                  # to try the script

The models have the shapes of Llama, 1.1 B and 7 B, and random weights. Every row is `Trainer.fit` of one module with
one AdamW: the rows differ in the callback and in the precision. What trains has fp32 weights and fp32 states of AdamW,
for full fine-tuning by `precision="bf16-mixed"`; frozen weights are bf16. A second row of full fine-tuning has bf16
weights and bf16 states (`precision="bf16-true"`). It is the cheapest one, but it loses updates that are smaller than a
rounding step of its weights.

A time is the median of windows of several steps that end in a synchronization. The memory is the peak of what torch
allocates. Checkpoints are those of the Trainer. Their files have the full size, but no values are written.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from speed import versions
from speed_sections.decoders import llama
from speed_sections.rows import describe
from speed_sections.settings import CUDA, DEVICE
from speed_sections.timing import clear, synchronize
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback

SHAPES = {"1.1 B": (8, 1024), "7 B": (4, 512), "tiny": (2, 32)}  # texts of a batch, tokens of a text
WARM_UP, WINDOWS, STEPS = 3, 5, 4
MIXED, BF16 = "full fine-tuning, fp32 weights and states", "full fine-tuning, bf16 weights and states"
Method = tuple[str, torch.dtype, Callable[[], list[Callback]]]
METHODS: dict[str, Method] = {  # precision, dtype of the base, callbacks
    MIXED: ("bf16-mixed", torch.float32, list),
    BF16: ("bf16-true", torch.bfloat16, list),
    "LoRA, r = 8 on q and v": ("bf16-true", torch.bfloat16, lambda: [LoRACallback(r=8, targets="qv", merge=False)]),
    "LoRA, r = 16 on all": ("bf16-true", torch.bfloat16, lambda: [LoRACallback(r=16, targets="all", merge=False)]),
}
PUBLISHED = (  # Hu et al. 2021, section 4.2 and its footnote on the throughput
    "GPT-3 175 B, r = 4 on q and v",
    "0.75 (43.1 against 32.5 tokens/s a GPU)",
    "0.29 (350 GB against 1.2 TB)",
    "10,000 (35 MB against 350 GB)",
)


class LanguageModel(LightningModule):
    """An ordinary module around a Llama. It is the same for every row.

    Args:
        size: a key of ``SHAPES``.
        dtype: of the weights.
    """

    def __init__(self, size: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = llama(size, dtype)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class SizedFiles(TorchCheckpointIO):
    """Writes checkpoints of the full size without their values, which takes no time and no space on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with torch.serialization.skip_data():
            torch.save(checkpoint, path)


class Measure(Callback):
    """Measures windows of steps, and two checkpoints at the end.

    Args:
        folder: for the checkpoints.
        steps: of a window.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.times: list[float] = []
        self.row: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        done = trainer.global_step - WARM_UP
        if done >= 0 and done % self.steps == 0:
            synchronize()
            now = time.perf_counter()
            if done == 0 and CUDA:
                torch.cuda.reset_peak_memory_stats()
            if done > 0:
                self.times.append((now - self.started) * 1000 / self.steps)
            self.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        self.row = {
            "ms": statistics.median(self.times),
            "gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "weights_bytes": self.bytes_of(trainer, weights_only=True),
            "resume_bytes": self.bytes_of(trainer, weights_only=False),
        }
        trainer.optimizers[0].state.clear()  # Lightning would move it to the CPU

    def bytes_of(self, trainer: Trainer, weights_only: bool) -> int:
        path = self.folder / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=weights_only)
        return path.stat().st_size


def measure(size: str, method: str, windows: int, steps: int) -> dict[str, Any]:
    """One row of the result file."""
    precision, dtype, callbacks = METHODS[method]
    batch, length = SHAPES[size]
    clear()
    module = LanguageModel(size, dtype)
    ids = torch.randint(0, module.model.config.vocab_size, (batch, length), device=DEVICE)
    total = WARM_UP + windows * steps
    with tempfile.TemporaryDirectory() as folder:
        watch = Measure(Path(folder), steps)
        trainer = Trainer(
            accelerator="gpu" if CUDA else "cpu",
            devices=1,
            precision=precision,
            max_steps=total,
            callbacks=[*callbacks(), watch],
            plugins=[SizedFiles()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([ids] * total, batch_size=None))
    return {"size": size, "batch": batch, "length": length, "method": method, **watch.row}


# ------------------------------------------------------------------ the report


def report(lines: list[dict[str, Any]]) -> str:
    """The result file in Markdown: what was measured, and the published claims beside ours."""
    heading, *rows = lines
    parts = [heading["versions"], f"`{heading['command']}`", claims(rows)]
    parts += [measured(size, [row for row in rows if row["size"] == size]) for size in dict.fromkeys(sizes(rows))]
    return "\n\n".join(parts) + "\n"


def sizes(rows: list[dict[str, Any]]) -> list[str]:
    return [row["size"] for row in rows]


def claims(rows: list[dict[str, Any]]) -> str:
    """LoRA as a share of both kinds of full fine-tuning."""
    lines = ["| | time of a step | peak memory | times smaller checkpoint |", "|---|---|---|---|"]
    lines.append(f"| published: {' | '.join(PUBLISHED)} |")
    by_name = {(row["size"], row["method"]): row for row in rows}
    for row in rows:
        for full in (MIXED, BF16):
            reference = by_name.get((row["size"], full))
            if reference is not None and row["method"] not in (MIXED, BF16):
                lines.append(f"| {row['size']}, {row['method']}, of {full} | {shares(row, reference)} |")
    return "\n".join(lines)


def shares(row: dict[str, Any], full: dict[str, Any]) -> str:
    if "failure" in row or "failure" in full:
        return "not measured | |"
    memory = f"{row['gib'] / full['gib']:.2f}" if full["gib"] else ""
    return f"{row['ms'] / full['ms']:.2f} | {memory} | {full['weights_bytes'] / row['weights_bytes']:,.0f}"


def measured(size: str, rows: list[dict[str, Any]]) -> str:
    """The numbers of one model."""
    lines = [f"## Llama's shapes, {size}, {rows[0]['batch']} x {rows[0]['length']} tokens", ""]
    lines += ["| | ms a step | peak GiB | trained parameters | checkpoint, MB | with AdamW's states, MB |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['method']} | {row.get('failure') or numbers(row)} |")
    return "\n".join(lines)


def numbers(row: dict[str, Any]) -> str:
    files = f"{row['weights_bytes'] / 1e6:,.1f} | {row['resume_bytes'] / 1e6:,.1f}"
    return f"{row['ms']:.1f} | {row['gib']:.2f} | {row['trained']:,} | {files}"


# ------------------------------------------------------------------ the call


def measured_or_failed(size: str, method: str, windows: int, steps: int) -> dict[str, Any]:
    """The row, or why there is none: the other rows are worth their time."""
    try:
        return measure(size, method, windows, steps)
    except Exception as error:
        batch, length = SHAPES[size]
        return {"size": size, "batch": batch, "length": length, "method": method, "failure": describe(error)}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.1 B", "7 B"], help="of the models")
    parser.add_argument("--tiny", action="store_true", help="one small model, to try the script")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended, one line of JSON for each")
    parser.add_argument("--report", type=Path, help="print the tables of this file, and measure nothing")
    arguments = parser.parse_args(words)
    if arguments.report is not None:
        print(report([json.loads(line) for line in arguments.report.read_text().splitlines()]), end="")
        return 0
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    chosen, windows, steps = (["tiny"], 2, 1) if arguments.tiny else (arguments.sizes, WINDOWS, STEPS)
    flags = " --tiny" if arguments.tiny else ""
    heading = {"versions": versions(), "command": f"python examples/benchmarks/costs.py{flags}"}
    lines: list[dict[str, Any]] = []
    append(lines, heading, arguments.out)
    for size in chosen:
        for method in METHODS:
            append(lines, measured_or_failed(size, method, windows, steps), arguments.out)
    print(report(lines))
    return 0


def append(lines: list[dict[str, Any]], line: dict[str, Any], out: Path | None) -> None:
    lines.append(line)
    print(json.dumps(line), flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
