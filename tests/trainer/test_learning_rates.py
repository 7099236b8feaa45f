"""The line that shows the rates of a run, for every division of parameters into groups."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, trainer


def line(configure, log, **arguments):
    """What a run says of its rates, with ``configure`` of the module as its ``configure_optimizers``."""
    module = Lit()
    module.configure_optimizers = lambda: configure(module)
    trainer(LoRACallback(r=2, merge=False, **arguments), max_epochs=1, limit_train_batches=1).fit(module, data())
    return [message for message in log if message.startswith("Learning rates")]


def one_group(module):
    return AdamW(module.parameters(), 1e-3)


def two_groups(module):
    groups = [{"params": module.net.layers.parameters()}, {"params": module.net.head.parameters(), "lr": 0.1}]
    return AdamW(groups, 1e-3)


def layer_wise(module):
    layers = [{"params": layer.parameters(), "lr": 10.0**-n} for n, layer in enumerate(module.net.layers, 2)]
    return AdamW([*layers, {"params": module.net.head.parameters()}], 1e-3)


def warm_up(module):
    optimizer = AdamW(module.parameters(), 1e-3)
    return [optimizer], [LambdaLR(optimizer, lambda step: step / 100)]


def one_cycle(module):
    optimizer = SGD(module.parameters(), 1e-4)
    return [optimizer], [OneCycleLR(optimizer, 0.2, 100)]


def probe(module):
    return SGD(module.net.head.parameters(), 0.1)


def small(module):
    return AdamW(module.parameters(), 2e-5)


def nearly_large(module):
    return AdamW(module.parameters(), 9e-5)


def large(module):
    return AdamW(module.parameters(), 1e-4)


def small_head(module):
    groups = [{"params": module.net.layers.parameters(), "lr": 1e-3}, {"params": module.net.head.parameters()}]
    return AdamW(groups, 2e-5)


def small_without_adam(module):
    return SGD(module.parameters(), 2e-5)


HEAD = {"also_train": ["head"]}
NOTE = " That is a rate of full fine-tuning; LoRA wants about ten times more: lr_scale=10."
SCALED = " The groups with adapters have lr_scale=10 in their rates"
CASES = [
    (one_group, {}, "AdamW: adapters 0.001."),
    (one_group, HEAD, "AdamW: adapters and what trains in full, in one group, 0.001."),
    (one_group, {"lr_scale": 10}, f"AdamW: adapters 0.01.{SCALED}."),
    (
        one_group,
        {**HEAD, "lr_scale": 10},
        f"AdamW: adapters and what trains in full, in one group, 0.01.{SCALED}; give what trains in full a group of "
        "its own to leave its rate alone.",
    ),
    (two_groups, {**HEAD, "lr_scale": 10}, f"AdamW: adapters 0.01, what trains in full 0.1.{SCALED}."),
    (layer_wise, {}, "AdamW: adapters 0.001 to 0.01."),
    (warm_up, {}, "AdamW: adapters 0.001."),
    (one_cycle, {}, "SGD: adapters 0.2."),
    (probe, {}, "SGD: adapters 0.1."),
    (small, {}, f"AdamW: adapters 2e-05.{NOTE}"),
    (small, {"lr_scale": 10}, f"AdamW: adapters 0.0002.{SCALED}."),
    (nearly_large, {}, f"AdamW: adapters 9e-05.{NOTE}"),
    (large, {}, "AdamW: adapters 0.0001."),
    (small_head, HEAD, "AdamW: adapters 0.001, what trains in full 2e-05."),
    (small_without_adam, {}, "SGD: adapters 2e-05."),
]


@pytest.mark.parametrize(("configure", "arguments", "expected"), CASES)
def test_the_line(configure, arguments, expected, log):
    assert line(configure, log, **arguments) == [f"Learning rates of {expected}"]


def test_following_the_advice_leaves_the_rate_of_a_head_alone(log):
    [text] = line(two_groups, log, **HEAD, lr_scale=10)
    assert "what trains in full 0.1" in text and "give what trains" not in text


def test_there_is_no_line_where_no_rate_is_known(log):
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            return closure()

    assert line(lambda module: Rateless(module.parameters()), log) == []
