"""Adapted layers that the user's own run leaves alone are named, with the exclude that leaves them."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback
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


def said(module: nn.Module, **arguments: object) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(LoRACallback(r=2, **arguments), max_steps=2).fit(module, data())
    return [str(each.message) for each in seen if "would not train" in str(each.message)]


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
