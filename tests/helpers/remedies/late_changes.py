"""Remedies of messages about what is set, copied or replaced after `setup`."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRACallback, load_from_checkpoint, load_lora_state_dict, lora_state_dict, save_adapter
from tests.helpers.models import Lit
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy, warnings_ignored

START = "trainer/watching/start_of_training.py"


def other_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return {name: torch.randn_like(value) / 4 for name, value in Lit().state_dict().items()}


class LoadsLate(Lit):
    def on_fit_start(self) -> None:
        self.load_state_dict(other_weights(), strict=False)


class LoadsInTime(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(other_weights())


@remedy(START, "Set after `setup`, by a hook", "`on_fit_start`", "set them in `__init__`, `setup` or `configure_model`")
def weights_that_are_loaded_in_time(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(), module=LoadsLate())
    trained = LoadsInTime()
    path = fit_to_file(folder, LoRACallback(merge=False), module=trained)
    assert torch.equal(outputs(load_from_checkpoint(LoadsInTime, path)), outputs(trained))


@remedy(START, "Written after `setup`, by a hook that initializes", "use `init_from`", "`load_lora_state_dict`")
def adapters_that_are_given(message: Expected, folder: Path) -> None:
    class Draws(Lit):
        def on_fit_start(self) -> None:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.1)

    class Loads(Lit):
        def on_fit_start(self) -> None:
            load_lora_state_dict(self, state)

    with message:
        fit(LoRACallback(), module=Draws())
    source = fit(LoRACallback(merge=False))
    state, start = {name: value.clone() for name, value in lora_state_dict(source).items()}, StartOfTraining()
    fit(LoRACallback(), start, module=Loads())
    save_adapter(source, folder / "given")
    again = StartOfTraining()
    fit(LoRACallback(init_from=str(folder / "given")), again)
    assert torch.equal(start.output, outputs(source)) and torch.equal(again.output, outputs(source))


class StartOfTraining(Callback):
    def on_train_batch_start(self, trainer: object, pl_module: nn.Module, batch: object, batch_idx: int) -> None:
        if batch_idx == 0:
            self.output = outputs(pl_module)
            pl_module.train()


@remedy("trainer/watching/frozen_facts.py", " The run that wrote the file set", "to the same values every time")
def a_base_that_every_stage_sets(message: Expected, folder: Path) -> None:
    trained = LoadsLate()
    with warnings_ignored():
        path = fit_to_file(folder, LoRACallback(merge=False), module=trained)
    with message:
        load_from_checkpoint(LoadsLate, path)
    assert torch.equal(outputs(load_from_checkpoint(LoadsInTime, path)), outputs(trained))


@remedy(
    "trainer/replaced_layers.py", "`{}` was replaced by a layer", "`net.head`", "copy the weights into the new layer"
)
def a_layer_that_is_built_again(message: Expected, folder: Path) -> None:
    class Rebuilds(Lit):
        keeps = False

        def setup(self, stage: str | None = None) -> None:
            old = self.state_dict()
            with torch.random.fork_rng():
                self.net.head = nn.Linear(16, 3)
            if self.keeps:
                self.load_state_dict(old, strict=False)

    class BuildsOnce(Lit):
        built = False

        def setup(self, stage: str | None = None) -> None:
            if not self.built:
                self.net.head, self.built = nn.Linear(16, 3), True

    module = fit(LoRACallback(targets=["head"], merge=False), module=Rebuilds())
    with message:
        fit(LoRACallback(targets=["head"], merge=False), module=module)
    for module in (Rebuilds(), BuildsOnce()):
        module.keeps = True
        fit(LoRACallback(targets=["head"], merge=False), module=module)
        before, start = outputs(module), StartOfTraining()
        fit(LoRACallback(targets=["head"], merge=False), start, module=module.train())
        assert torch.equal(start.output, before)


@remedy("trainer/run.py", "{} came after `setup` as a copy of adapted layers", "Make it in `setup`")
def a_copy_that_is_made_in_setup(message: Expected, folder: Path) -> None:
    class CopiesLate(Lit):
        def on_fit_start(self) -> None:
            self.teacher = copy.deepcopy(self.net)

    class CopiesInTime(Lit):
        def setup(self, stage: str) -> None:
            self.teacher = copy.deepcopy(self.net)

        def loss(self, batch: list[Tensor]) -> Tensor:
            return super().loss(batch) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))

    with message:
        fit(LoRACallback(), module=CopiesLate())
    module = fit(LoRACallback(merge=False), module=CopiesInTime())
    assert module.teacher.layers[0].q.lora.default.B.any()


@remedy("model/report/random_heads.py", "Frozen output {} {}: the weights look", "also_train=['net.head']", "base=path")
def a_head_that_was_just_drawn(message: Expected, folder: Path) -> None:
    class Drawn(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.head = nn.Linear(16, 3)

    with message:
        fit(LoRACallback(), module=Drawn())
    trained = Drawn()
    path = fit_to_file(folder / "full", LoRACallback(also_train=["net.head"], merge=False), module=trained)
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path)), outputs(trained))
    frozen = Drawn()
    torch.save(frozen.state_dict(), folder / "base.pt")
    path = fit_to_file(folder / "frozen", LoRACallback(merge=False), module=frozen)
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=folder / "base.pt")), outputs(frozen))
