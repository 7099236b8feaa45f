"""Measures of updates in two CPU processes (gloo), under every strategy: `python analysis_two_processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import distributed, nn

from lightning_lora import LoRACallback, LoRAMonitor, lora_parameters
from lightning_lora.analysis import AmplificationFactor, SubspaceSimilarity, UpdateRatio, UpdateSpectrum
from tests.helpers.models import data, trainer
from tests.helpers.strategy_runs import RUNS, whole
from tests.helpers.two_processes import end

NAMES = [name for name in ("ddp", "fsdp1", "fsdp2", "fsdp2-apply-before", "deepspeed-3") if name in RUNS]
MERGED = ("ddp", "fsdp2")  # in place


def measured(module: nn.Module, sync: bool = False) -> dict[str, object]:
    """What every metric says; `sync` gathers the states of both ranks."""
    metrics = {metric: metric(sync_on_compute=sync) for metric in (UpdateSpectrum, UpdateRatio, AmplificationFactor)}
    for metric in metrics.values():
        metric.update(module)
    similarity = SubspaceSimilarity("B", sync_on_compute=sync)
    similarity.update(module, module)
    results = {type(metric).__name__: metric.compute() for metric in (*metrics.values(), similarity)}
    counts = {type(metric).__name__: metric.measured.numel() for metric in (*metrics.values(), similarity)}
    return {**results, "counts": counts}


class Spy(Callback):
    """The metrics and the adapters at the end of training."""

    def on_train_end(self, trainer, pl_module):
        adapters = {name: whole(value).detach().cpu().clone() for name, value in lora_parameters(pl_module)}
        self.seen = {"adapters": adapters, "alone": measured(pl_module), "synced": measured(pl_module, sync=True)}


def run(name: str, folder: Path) -> dict[str, object]:
    make, strategy = RUNS[name]
    torch.manual_seed(0)
    spy, logger = Spy(), CSVLogger(folder / name, name="", version="")
    callbacks = (LoRACallback(r=4, merge=name in MERGED), LoRAMonitor(every_n_steps=3), spy)
    settings = {"strategy": strategy(), "accelerator": "cpu", "devices": 2, "max_epochs": 2, "logger": logger}
    module = make()
    trainer(*callbacks, **settings).fit(module, data(), data(1))
    return {**spy.seen, "after": measured(module) if name in MERGED else None}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {name: run(name, folder) for name in NAMES}
    torch.save(results, folder / f"results-{distributed.get_rank()}.pt")
    end(0)


if __name__ == "__main__":
    main()
