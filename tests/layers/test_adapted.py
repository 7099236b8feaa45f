"""The class swap that all methods share: the object stays, its class and one child come and go."""

from __future__ import annotations

import copy
import pickle
from abc import ABC

import pytest
import torch
from torch import nn

from lightning_lora.layers.adapted import adapted_modules, added_to, has_added, swap_in, swap_out, swapped_class
from tests.helpers.toy_method import Toy, ToyLayer


class Described(ABC, nn.Linear):
    """Python gives it the memory layout of `ABC`."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapted(cls: type[nn.Linear] = nn.Linear) -> nn.Linear:
    torch.manual_seed(0)
    layer = cls(4, 4)
    swap_in(layer, ToyLayer, Toy(4, 2, seed=0))
    with torch.no_grad():
        layer.toy.up.fill_(0.1)
    return layer


@pytest.mark.parametrize("cls", [nn.Linear, Described, Doubled])
def test_swap_in_and_out(cls):
    layer, x = cls(4, 4), torch.randn(2, 4)
    weight, attributes, y = layer.weight, set(vars(layer)), layer(x)
    child = Toy(4, 2, seed=0)
    swap_in(layer, ToyLayer, child)
    with torch.no_grad():
        child.up.fill_(0.1)
    assert isinstance(layer, cls) and isinstance(layer, ToyLayer) and layer.weight is weight
    assert torch.equal(layer(x), y + y @ child.down.T @ child.up.T)
    assert list(layer.state_dict()) == ["weight", "bias", "toy.down", "toy.up"]
    assert added_to(layer) is child and has_added(layer) and type(layer).original_class is cls
    assert swap_out(layer) is child
    assert type(layer) is cls and set(vars(layer)) == attributes and torch.equal(layer(x), y)


def test_one_class_for_each_pair():
    assert swapped_class(ToyLayer, nn.Linear) is swapped_class(ToyLayer, nn.Linear)
    assert type(adapted()) is type(adapted()) is swapped_class(ToyLayer, nn.Linear)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("cls", [nn.Linear, Described, Doubled])
def test_copies_and_pickles(copied, cls):
    layer, x = adapted(cls), torch.randn(2, 4)
    other = copied(layer)
    assert type(other) is type(layer) and other.toy is not layer.toy
    assert torch.equal(other(x), layer(x))


def test_the_child_follows_the_mode_and_keeps_its_dtype():
    layer = nn.Linear(4, 4).eval()
    swap_in(layer, ToyLayer, Toy(4, 2, seed=0))
    assert not layer.toy.training
    down = layer.toy.down.detach().clone()
    layer.toy.down.grad = torch.ones_like(down)
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.toy.down, down) and torch.equal(layer.toy.down.grad, torch.ones_like(down))


def test_the_child_counts_what_a_state_dict_gave_it():
    layer = adapted()
    layer.load_state_dict({"weight": layer.weight}, strict=False)
    assert layer.toy.loads == 0
    layer.load_state_dict({"toy.up": layer.toy.up}, strict=False)
    assert layer.toy.loads == 1


def test_adapted_modules_come_once_by_clean_names():
    layer = adapted()
    model = torch.compile(nn.ModuleDict({"a": layer, "b": layer, "plain": nn.Linear(4, 4)}))
    assert list(adapted_modules(model)) == [("a", layer)]
    assert not has_added(model._orig_mod["plain"])
