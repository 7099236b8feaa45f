"""What LoRAMonitor costs: the share of a run's time that its measurements take.

    python examples/benchmarks/monitor.py --out examples/benchmarks/monitor

The module is that of `methods.py`, all-MiniLM-L6-v2's shapes with random weights: 8 texts of 32 tokens, LoRA of rank 8
on every projection of attention (24 layers), 100 steps of AdamW, a CSVLogger. `every_n_steps` is 50,
so a run measures three times: before the first step, which also computes the norms of the weights, after 50 steps and
at the end. Small batches make the share large.

On a CPU times are those that the process computes, so that other work on the machine counts in neither. On a GPU
(`--accelerator gpu`) they are those of the clock, synchronized around each measurement. `--tiny` tries the script.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from methods import HEAD, TINY, Shapes, batch_of, classifier, heading
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAMonitor

STEPS, EVERY = 100, 50


@dataclass
class Times:
    """Seconds.

    Args:
        run: of the whole run, from its first batch to its end.
        measurements: of each measurement.
    """

    run: float = 0.0
    measurements: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the run's time that the measurements take."""
        return sum(self.measurements) / self.run


def clock(gpu: bool) -> Callable[[], float]:
    """Seconds of the process's work; with a GPU of the clock, when it has done its work."""

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized if gpu else time.process_time


class Clock(Callback):
    """Times a run that has a monitor, and the hooks of the monitor that measure."""

    def __init__(self, monitor: LoRAMonitor, gpu: bool) -> None:
        self.times, self.now, self.monitor = Times(), clock(gpu), monitor
        for hook in ("on_train_batch_start", "on_train_end"):
            setattr(monitor, hook, self.timed(getattr(monitor, hook)))

    def timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def run(trainer: Trainer, module: LightningModule, *args: Any) -> None:
            before, start = self.monitor._measured_at, self.now()
            hook(trainer, module, *args)
            if self.monitor._measured_at != before:
                self.times.measurements.append(self.now() - start)

        return run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times.run = self.now() - self.start


def measure(shapes: Shapes, steps: int, every: int, accelerator: str, folder: Path) -> Times:
    """The times of one run."""
    monitor = LoRAMonitor(every_n_steps=every)
    clock_of_run = Clock(monitor, accelerator == "gpu")
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        logger=CSVLogger(folder),
        callbacks=[LoRACallback(r=8, targets="attn", also_train=HEAD), monitor, clock_of_run],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier(shapes), DataLoader([batch_of(shapes)] * steps, batch_size=None))
    return clock_of_run.times


def table(times: Times, steps: int) -> str:
    """The result in Markdown."""
    first, *others = (1000 * each for each in times.measurements)
    rest = times.run - sum(times.measurements)
    cells = (f"{1000 * rest / steps:.0f}", f"{first:.0f}", f"{statistics.mean(others):.0f}", f"{times.share:.2%}")
    names = ("ms a step", "ms of the first measurement", "ms of a later one", "share of the run")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(cells)} |"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes and 4 steps, to try the script")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--out", help="write OUT_<date>.md too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*many workers.*|.*treespec.*|.*in eval mode.*|.*logging interval.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    shapes, steps, every = (TINY, 4, 2) if options.tiny else (Shapes(), STEPS, EVERY)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(shapes, steps, every, options.accelerator, Path(folder))
    where = f"{torch.cuda.get_device_name()}, {heading()}" if options.accelerator == "gpu" else heading()
    words = [word for word in arguments if word != "--out" and word != options.out]
    command = " ".join(["python examples/benchmarks/monitor.py", *words])
    text = f"# What LoRAMonitor costs\n\n{where}\n\n`{command}`\n\n{table(times, steps)}\n"
    print(text)
    if options.out is not None:
        Path(f"{options.out}_{datetime.date.today()}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
