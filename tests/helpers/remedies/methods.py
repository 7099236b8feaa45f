"""Remedies of messages about methods other than LoRA, and about two methods on one model."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    TuneCallback,
    TuneConfig,
    adapt,
    load_from_checkpoint,
    remove_adapted,
)
from lightning_lora.cli.convert import export_checkpoint
from lightning_lora.methods.known import METHODS
from tests.helpers.models import Encoder, Lit, LitEncoder, data, trainer
from tests.helpers.remedies.case import Expected, fit_to_file, remedy
from tests.helpers.toy_method import ToyConfig, ToyMethod

SITES, READING, LIVENESS = "methods/tune/sites.py", "trainer/checkpointing/reading.py", "trainer/watching/liveness.py"


@remedy(
    "model/same_config.py", "The model is adapted by {} already", "TuneConfig already", "call `remove_adapted(model)`"
)
def another_method_on_the_base(message: Expected, folder: Path) -> None:
    adapt(model := Encoder(), TuneConfig("bias"))
    with message:
        adapt(model, LoRAConfig())
    adapt(model, TuneConfig("bias"))
    remove_adapted(model)
    adapt(model, LoRAConfig())
    adapt(model := Encoder(), TuneConfig("bias"))
    with torch.no_grad():
        model.head.bias.fill_(3)
    remove_adapted(model, keep=True)
    adapt(model, LoRAConfig())
    remove_adapted(model)
    assert bool((model.head.bias == 3).all())


@remedy("methods/added.py", "The model is adapted by a {} already", "`train='norm'`", "call `remove_adapted(model)`")
def other_arguments_of_the_same_method(message: Expected, folder: Path) -> None:
    adapt(model := Encoder(), TuneConfig("bias"))
    with message:
        adapt(model, TuneConfig("norm"))
    adapt(model, TuneConfig("bias"))
    remove_adapted(model)
    adapt(model, TuneConfig("norm"))


@remedy(
    "methods/added.py", "`{}` has a {}, and in this model", "`0` has a toy", "call `remove_adapted` with that module"
)
def a_site_of_another_model(message: Expected, folder: Path) -> None:
    class First(ToyMethod):
        def sites(self, survey):
            return {name: site for name, site in super().sites(survey).items() if name in ("", "1")}

    ToyMethod(ToyConfig()).complete(part := nn.Linear(2, 2))
    model, method = nn.Sequential(part, nn.Linear(2, 2)), First(ToyConfig())
    with message:
        method.complete(model)
    with mock.patch.dict(METHODS, {ToyConfig: ToyMethod}):
        remove_adapted(part)
    assert method.complete(model) == ["1"]


@remedy("model/copies.py", "A copy of a {} with a trained {}", "trained toy", "Copy the model before it is adapted")
def a_copy_that_is_made_before(message: Expected, folder: Path) -> None:
    method = ToyMethod(ToyConfig())

    def trained() -> nn.ModuleDict:
        method.complete(model := nn.ModuleDict({"net": nn.Linear(2, 2)}))
        with torch.no_grad():
            model["net"].toy.up.fill_(1)
        return model

    model = trained()
    known = list(model.modules())
    model["late"] = copy.deepcopy(model["net"])
    with message:
        method.make_plain(model, known)
    model = nn.ModuleDict({"net": nn.Linear(2, 2)})
    model["early"] = copy.deepcopy(model["net"])
    assert method.complete(model) == ["net", "early"]


@remedy("methods/tune/config.py", "`train` must be one of {} or a list", "'embed'", "write train=['embed']")
def a_part_by_its_name(message: Expected, folder: Path) -> None:
    with message:
        TuneConfig("embed")
    assert adapt(Encoder(), TuneConfig(["embed"])) == ["embed"]


@remedy(SITES, "`train='head'` found {} output heads", "`first_head`, `second_head`", "train=['first_head']")
def one_of_two_heads(message: Expected, folder: Path) -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("body", "first_head", "second_head")})

    with message:
        adapt(model(), TuneConfig("head"))
    assert adapt(model(), TuneConfig(["first_head"])) == ["first_head"]


@remedy(SITES, "Take train={}, or name", "`train='norm'` found no", "Take train='bias', or name", "train=['1']")
def another_word_or_a_name(message: Expected, folder: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    with message:
        adapt(model(), TuneConfig("norm"))
    assert adapt(model(), TuneConfig("bias")) == ["0", "1"]
    assert adapt(model(), TuneConfig(["1"])) == ["1"]


@remedy(SITES, "Name what to train in a list", "`train='norm'` found no", "as in train=['1']")
def what_is_there_in_place_of_norms(message: Expected, folder: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))

    with message:
        adapt(model(), TuneConfig("norm"))
    assert adapt(model(), TuneConfig(["1"])) == ["1"]


@remedy(READING, "{} is a file of another method", "`ckpt_path='", "Give the callback of that method")
def a_file_by_its_own_callback(message: Expected, folder: Path) -> None:
    path = fit_to_file(folder, TuneCallback("bias"))
    with message:
        trainer(LoRACallback(targets=["q"])).fit(Lit(), data(), ckpt_path=path)
    trainer(TuneCallback("bias")).fit(Lit(), data(), ckpt_path=path)


@remedy(READING, "{} was written with a {}, and this needs A and B", "`CKPT='", "load_from_checkpoint(cls, path)")
def a_file_without_A_and_B(message: Expected, folder: Path) -> None:
    path = Path(fit_to_file(folder, TuneCallback("bias")))
    with message:
        export_checkpoint(path, folder / "adapter")
    load_from_checkpoint(Lit, path)


@remedy("trainer/compatibility.py", "The Trainer has {} and {}", "LoRACallback and TuneCallback", "`also_train`")
def one_callback_of_two(message: Expected, folder: Path) -> None:
    with message:
        trainer(LoRACallback(targets=["q"]), TuneCallback("head")).fit(Lit(), data())
    trainer(LoRACallback(targets=["q"], also_train=["head"])).fit(Lit(), data())


class TakesOut(Callback):
    """A callback that takes a parameter out of the optimizer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, trainer, pl_module):
        parameter = pl_module.get_parameter(self.name)
        for group in trainer.optimizers[0].param_groups:
            group["params"][:] = [each for each in group["params"] if each is not parameter]


@remedy(LIVENESS, "No optimizer holds the {} of {}", "trained parameter of `net.head.bias`", "leave the layer out with")
def a_parameter_that_a_callback_takes(message: Expected, folder: Path) -> None:
    taking = TakesOut("net.head.bias")
    with message:
        trainer(taking, TuneCallback("bias"), max_epochs=1).fit(Lit(), data())
    trainer(TuneCallback("bias"), max_epochs=1).fit(Lit(), data())
    trainer(taking, TuneCallback("bias", exclude=["head"]), max_epochs=1).fit(Lit(), data())


@remedy(LIVENESS, "{} did not run, or not into the loss: this batch", "exclude=['net.layers.1']")
def a_block_that_does_not_run(message: Expected, folder: Path) -> None:
    with message:
        trainer(TuneCallback("bias"), max_epochs=2).fit(LitEncoder(skipped=1), data())
    trainer(TuneCallback("bias", exclude=["net.layers.1"]), max_epochs=2).fit(LitEncoder(skipped=1), data())
