"""Remedies of messages about several adapters in one run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, unmerge_lora
from tests.helpers.models import trainer
from tests.helpers.remedies.case import Expected, remedy
from tests.helpers.routed import ADAPTERS, RoutedLit, Rows, rows


def callback(**kwargs: object) -> LoRACallback:
    return LoRACallback(**{"r": 2, "adapters": ADAPTERS, "route": "task", "merge": False, **kwargs})  # type: ignore[arg-type]


def fit(own: LoRACallback, batches: DataLoader | None = None, module: RoutedLit | None = None) -> RoutedLit:
    module = module or RoutedLit()
    trainer(own, max_epochs=1).fit(module, batches or rows())
    return module


@remedy("arguments.py", "`balance=True` divides each adapter's gradient", "Give `route`", "leave `balance` out")
def balance_with_a_route(message: Expected, folder: Path) -> None:
    with message:
        callback(balance=True, route=None)
    fit(callback(balance=True))
    fit(callback(route=None))


@remedy("methods/lora.py", "`keep` has {}", "'fr'", "Leave it out of one of the two")
def trained_or_kept(message: Expected, folder: Path) -> None:
    with message:
        callback(keep=["fr"])
    first = fit(callback(adapters={"fr": {}}), rows(tasks=["fr"] * 8))
    fit(callback(keep=["fr"], adapters={name: own for name, own in ADAPTERS.items() if name != "fr"}), module=first)


@remedy("trainer/several/route.py", "`route={}` must be an entry of every batch", "'task'", "keys 'x', 'y'")
def an_entry_in_every_batch(message: Expected, folder: Path) -> None:
    data = Rows()
    without = {"x": data.x[:8], "y": data.y[:8]}
    with message:
        fit(callback(), DataLoader([without], batch_size=None))  # type: ignore[arg-type]
    for task in ("de", 1, torch.zeros(8, dtype=torch.long)):
        fit(callback(), DataLoader([{**without, "task": task}], batch_size=None))  # type: ignore[arg-type]


@remedy("trainer/several/routed_callback.py", "`route='dataloader'` chooses by", "Name an entry of the batch")
def an_entry_in_training(message: Expected, folder: Path) -> None:
    with message:
        fit(callback(route="dataloader"))
    module = fit(callback())
    trainer(callback(route="dataloader")).predict(module, [rows(), rows()])


@remedy("trainer/several/chosen.py", "`route={}` has no effect", "give `ckpt_path`", "`unmerge_lora(module)`")
def a_merged_module_that_chooses(message: Expected, folder: Path) -> None:
    runner, module = trainer(callback(merge={"fr": 1.0}), max_epochs=1), RoutedLit()
    runner.fit(module, rows())
    runner.save_checkpoint(folder / "plain.ckpt")
    with message:
        trainer(callback()).predict(module, rows())
    unmerge_lora(module)
    trainer(callback()).predict(module, rows())
