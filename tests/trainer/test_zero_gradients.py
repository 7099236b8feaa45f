"""A run in which every gradient is exactly zero is told so, and by what."""

import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, lora_parameters
from tests.helpers.models import Lit, data, trainer


class ZeroHead(Lit):
    """Starts with a head of zeros, as timm's Mixer and torchvision's ViT do."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net.head.weight)


def warnings_of(module, **arguments):
    callback = LoRACallback(**{"r": 2, "merge": False, **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=1, limit_train_batches=3).fit(module, data())
    return [str(each.message) for each in caught if "zero" in str(each.message)]


def test_a_frozen_head_of_zeros_is_named_and_the_remedy_trains():
    module = ZeroHead()
    [told] = warnings_of(module)
    assert told.startswith("Every gradient is exactly zero at the first step, so nothing trains. `net.head` is frozen")
    assert "also_train=['net.head']" in told
    assert not any(p.any() for name, p in lora_parameters(module) if name.endswith(".B"))
    module = ZeroHead()
    assert warnings_of(module, also_train=["net.head"]) == []
    assert all(p.any() for name, p in lora_parameters(module) if name.endswith(".B"))


def test_a_loss_that_is_always_zero():
    class Zero(Lit):
        def loss(self, batch):
            return 0 * super().loss(batch)

    [told] = warnings_of(Zero())
    assert "No frozen weight matrix is zero: does the loss depend on the model's output?" in told


@pytest.mark.parametrize("arguments", [{}, {"liveness": False}])
def test_nothing_is_said_of_a_run_that_trains(arguments):
    assert warnings_of(Lit(), **arguments) == []


def test_only_matrices_of_zeros_are_named():
    class ZeroBias(ZeroHead):
        def __init__(self):
            super().__init__()
            torch.nn.init.zeros_(self.net.layers[0].q.bias)

    [told] = warnings_of(ZeroBias())
    assert "`net.head` is frozen" in told and "q" not in told.partition("`net.head`")[2].partition("is frozen")[0]
