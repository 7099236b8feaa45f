"""Remedies of messages about several adapters in one run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    unmerge_lora,
)
from tests.helpers.models import checkpoints, trainer
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


@remedy("methods/several.py", "`keep` has {}, which this run trains", "'fr'", "Leave it out of one of the two")
def trained_or_kept(message: Expected, folder: Path) -> None:
    with message:
        callback(keep=["fr"])
    first = fit(callback(adapters={"fr": {}}), rows(tasks=["fr"] * 8))
    fit(callback(keep=["fr"], adapters={name: own for name, own in ADAPTERS.items() if name != "fr"}), module=first)


@remedy("trainer/batches/entry.py", "`{}={}` must be an entry of every batch", "`route='task'`", "keys 'x', 'y'")
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


@remedy("methods/several.py", "`merge` has {}", "'es'", "Write one of its own", "`de`")
def a_merge_of_an_own_adapter(message: Expected, folder: Path) -> None:
    with message:
        callback(merge={"es": 1.0})
    fit(callback(merge={"de": 1.0}))


@remedy("methods/several.py", "`keep` has {}, which is no adapter", "its others: none", "load_adapter", "leave it out")
def a_kept_adapter_that_is_there(message: Expected, folder: Path) -> None:
    source = RoutedLit()
    apply_lora(source, LoRAConfig(r=2, name="fr"))
    save_adapter(source, folder / "fr")
    with message:
        fit(LoRACallback(r=2, name="de", keep=["fr"]))
    module = RoutedLit()
    load_adapter(module, folder / "fr", name="fr")
    fit(LoRACallback(r=2, name="de", keep=["fr"]), module=module)
    fit(LoRACallback(r=2, name="de"))


@remedy("methods/several.py", "This run trains {}", "`fr`, `de`, `it`", "merge={'fr': 1.0}")
def which_of_several_is_merged(message: Expected, folder: Path) -> None:
    with message:
        fit(callback(merge=True))
    module = fit(callback(merge={"fr": 1.0}))
    assert not any(".lora." in key for key in module.state_dict())


@remedy("trainer/checkpointing/resumed_adapters.py", "`ckpt_path={}` was written while kept", "{'fr': 1.0}", "`keep`")
def the_strengths_of_the_file(message: Expected, folder: Path) -> None:
    def run(strength: float, ckpt: Path | None, epochs: int) -> Path:
        module, files = RoutedLit(), checkpoints(folder / str(epochs), monitor=None, save_top_k=1)
        apply_lora(module, LoRAConfig(r=2, name="fr"))
        own = LoRACallback(r=2, name="de", keep={"fr": strength}, merge=False)
        trainer(own, files, max_epochs=epochs).fit(module, rows(), ckpt_path=ckpt)
        return folder / str(epochs) / "last.ckpt"

    first = run(1.0, None, 1)
    with message:
        run(0.0, first, 2)
    run(1.0, first, 2)


@remedy("trainer/several/routed_callback.py", "`merge='best'` would merge", "merge={'fr': 1.0}", "merge=False")
def the_best_of_several(message: Expected, folder: Path) -> None:
    with message:
        callback(merge="best")
    fit(callback(merge={"fr": 1.0}))
    files = checkpoints(folder)
    trainer(callback(), files, max_epochs=1).fit(RoutedLit(), rows(), rows())
    load_from_checkpoint(RoutedLit, files.best_model_path)


@remedy("trainer/several/update_scale.py", "`lr_scale` in `adapters`", "Adafactor", "Use SGD", "leave `lr_scale` out")
def an_optimizer_for_rates_of_adapters(message: Expected, folder: Path) -> None:
    own = {"fr": {}, "de": {"lr_scale": 2.0}, "it": {}}
    module = RoutedLit()
    module.configure_optimizers = lambda: torch.optim.Adafactor(module.parameters())  # type: ignore[method-assign,return-value]
    with message:
        fit(callback(adapters=own), module=module)
    fit(callback(), module=module)
    fit(callback(adapters=own))
