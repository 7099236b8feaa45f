"""Adapted layers that the user's own run leaves alone are named, with the exclude that leaves them."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, TuneCallback
from tests.helpers.models import Lit, data, net, trainer


class Distilled(Lit):
    """A student, and a teacher that the module keeps as it is, in one of two ways."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.teacher, self.frozen = copy.deepcopy(net()), frozen
        self.teacher.requires_grad_(not frozen)

    def configure_optimizers(self) -> object:
        return torch.optim.AdamW(self.parameters() if self.frozen else self.net.parameters(), lr=1e-2)

    def loss(self, batch):
        return super().loss(batch) + nn.functional.mse_loss(self(batch[0]), self.teacher(batch[0]))


def warnings_of(module: nn.Module, **arguments: object) -> list[str]:
    """Those of a run with an evaluation that name an adapted layer."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(LoRACallback(r=2, **arguments), max_epochs=1, limit_train_batches=2).fit(module, data(), data(1))
    return [str(each.message) for each in seen if ".q`" in str(each.message)]


def said(module: nn.Module, **arguments: object) -> list[str]:
    return [message for message in warnings_of(module, **arguments) if "`targets` means" in message]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("targets", ["attn", ["q", "v"]])
def test_a_teacher_is_named_and_the_advice_leaves_it(frozen, targets):
    (message,) = said(Distilled(frozen), targets=targets, exclude=["layers.1.q"])
    assert message.startswith("`teacher.layers.0.q`, ") or message.startswith("`teacher.layers.*.")
    (advice,) = re.findall(r"give exclude=(\[.*\])\.", message)
    assert advice == "['layers.1.q', 'teacher']"
    module, before = Distilled(frozen), net().state_dict()
    assert said(module, targets=targets, exclude=["layers.1.q", "teacher"]) == []
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


class WithoutGradients(Distilled):
    """Its teacher gives no gradients, and evaluation does not call it."""

    def training_step(self, batch, index):
        with torch.no_grad():
            goal = self.teacher(batch[0])
        return Lit.loss(self, batch) + nn.functional.mse_loss(self(batch[0]), goal)

    def validation_step(self, batch, index):
        self.log("val_loss", Lit.loss(self, batch))


@pytest.mark.parametrize("cls", [Distilled, WithoutGradients])
def test_a_teacher_is_named_in_one_message_alone(cls):
    (message,) = warnings_of(cls(frozen=True), targets="attn")
    assert message.startswith("`teacher.layers.*.q`, ") and "give exclude=['teacher']." in message


class FrozenReference(Distilled):
    """The module freezes its backbone, which an adapter is meant to train, and a copy of it."""

    def __init__(self, other: bool = False) -> None:
        super().__init__(frozen=True)
        self.net.layers.requires_grad_(False)
        if other:
            for parameter in self.teacher.parameters():
                parameter.data.mul_(0.5)


def test_a_copy_of_a_frozen_backbone_is_named_and_the_advice_leaves_it():
    (message,) = said(FrozenReference(), targets="attn", exclude=["layers.1.q"])
    assert message.startswith("`teacher.layers.")
    assert ", copied from `net.layers" in message and "would not train without adapters, nor would these." in message
    (advice,) = re.findall(r"give exclude=(\[.*\])\.", message)
    assert advice == "['layers.1.q', 'teacher']"
    module, before = FrozenReference(), net().state_dict()
    assert said(module, targets="attn", exclude=["layers.1.q", "teacher"]) == []
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    assert said(FrozenReference(other=True), targets="attn") == [], "other weights: two backbones, both meant"


class HeadOnly(Lit):
    def configure_optimizers(self) -> object:
        return torch.optim.AdamW(self.net.head.parameters(), lr=1e-2)


class FrozenBackbone(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers.requires_grad_(False)


@pytest.mark.parametrize("cls", [Lit, HeadOnly, FrozenBackbone])
def test_nothing_is_said_where_all_adapted_layers_are_treated_alike(cls):
    assert said(cls(), targets="attn") == []


def test_a_name_that_would_cover_a_trained_layer_is_not_advised():
    module = Lit()
    module.net.layers[0].q.requires_grad_(False)
    (message,) = said(module, targets=["q"])
    assert message.startswith("`net.layers.0.q` would not train") and "exclude=['net.layers.0']" in message


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_that_tune_callback_means_is_named(frozen):
    def messages(module, **arguments):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer(TuneCallback("bias", **arguments), max_epochs=1, limit_train_batches=2).fit(module, data())
        return [str(each.message) for each in seen if "`train` means" in str(each.message)]

    (message,) = messages(Distilled(frozen))
    assert message.startswith("`teacher` has the parameters of `net`, and would not train without this callback")
    assert "give exclude=['teacher']." in message
    module, before = Distilled(frozen), net().state_dict()
    assert messages(module, exclude=["teacher"]) == []
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def test_a_frozen_backbone_is_what_bias_tuning_is_for():
    class OnHead(Lit):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.head.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(num_workers|validation_step|treespec|Frozen output head)")
        trainer(TuneCallback("bias"), max_epochs=1, limit_train_batches=2).fit(OnHead(), data())
