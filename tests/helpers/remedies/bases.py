"""Remedies of messages about `base`, from which `load_from_checkpoint` takes weights."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from lightning_lora import (
    load_from_checkpoint,
    merge_lora,
    unmerge_lora,
)
from tests.helpers.models import Lit, Net, net
from tests.helpers.remedies.case import Expected, outputs, remedy
from tests.helpers.remedies.checkpoints import Drawn, run

BASE = "trainer/checkpointing/base_weights.py"


@remedy(BASE, "`base` has merged adapters", "call `unmerge_lora(base)` first")
def a_base_that_is_unmerged(message: Expected, folder: Path) -> None:
    trained, path = run(folder)
    base = copy.deepcopy(trained)
    merge_lora(base)
    with message:
        load_from_checkpoint(Drawn, path, base=base)
    unmerge_lora(base)
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=base)), outputs(trained))


@remedy(
    BASE,
    "`base={}` holds {}. Give the file",
    ".ckpt'` holds adapters alone",
    "Give the file or the module that they train on",
)
def a_base_that_is_no_adapter(message: Expected, folder: Path) -> None:
    base = Drawn()
    torch.save(base.state_dict(), folder / "base.pt")
    trained, path = run(folder, copy.deepcopy(base))
    with message:
        load_from_checkpoint(Drawn, path, base=path)
    for given in (folder / "base.pt", base):
        assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=given)), outputs(trained))


@remedy(BASE, "`base={}` must hold a state dict", "list.pt'` must", "torch.save(model.state_dict(), path)")
def a_base_that_is_a_state_dict(message: Expected, folder: Path) -> None:
    model = Drawn()
    torch.save([1, 2], folder / "list.pt")
    torch.save(model.state_dict(), path := folder / "base.pt")
    trained, file = run(folder, model)
    with message:
        load_from_checkpoint(Drawn, file, base=folder / "list.pt")
    assert torch.equal(outputs(load_from_checkpoint(Drawn, file, base=path)), outputs(trained))


@remedy(
    BASE, "`base` has no tensor under any name", "the nearest that it has is", "Rename its entries, or load it into"
)
def a_base_with_the_names_of_the_module(message: Expected, folder: Path) -> None:
    state = Drawn().state_dict()
    torch.save({f"{name}_old": value for name, value in state.items()}, folder / "old.pt")
    (model := Lit()).load_state_dict(state)
    trained, path = run(folder, model)
    with message:
        load_from_checkpoint(Drawn, path, base=folder / "old.pt")
    renamed = {name.removesuffix("_old"): value for name, value in torch.load(folder / "old.pt").items()}
    torch.save(renamed, folder / "new.pt")
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=folder / "new.pt")), outputs(trained))
    (module := Drawn()).load_state_dict(renamed)
    assert torch.equal(outputs(load_from_checkpoint(module, path)), outputs(trained))


@remedy(
    BASE, "`base` fits {}. Load it", "`net` and `teacher`", "Load it into the module yourself, and give that module"
)
def a_base_of_two_parts(message: Expected, folder: Path) -> None:
    class Taught(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net)

    network = net()
    nn.init.ones_(network.layers[0].ln.bias)

    def ready() -> Taught:
        module = Taught()
        module.net.load_state_dict(network.state_dict())
        return module

    trained, path = run(folder, ready(), exclude=["teacher"])
    with message:
        load_from_checkpoint(Taught, path, base=network)
    assert torch.equal(outputs(load_from_checkpoint(ready(), path)), outputs(trained))


@remedy(BASE, "has no memory here, on the meta device", "`base` does not fit", "make the module on another one")
def a_module_with_memory(message: Expected, folder: Path) -> None:
    trained, path = run(folder)

    class OnMeta(Lit):
        device_of = "meta"

        def __init__(self) -> None:
            super().__init__()
            with torch.device(self.device_of):
                self.net = Net()

    class OnCpu(OnMeta):
        device_of = "cpu"

    with message:
        load_from_checkpoint(OnMeta, path, base=net())
    assert torch.equal(outputs(load_from_checkpoint(OnCpu, path, base=net())), outputs(trained))
