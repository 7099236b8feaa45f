"""Models on either side of the equation, the formula written out in fp64, and a count of the sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.sums.group import SumGroup
from tests.helpers import oracles
from tests.helpers.models import Tower

SIDES = ("weights", "activations")
BOTH_WAYS = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))


def adapted(model: nn.Module, compute: str = "weights", **arguments: object) -> nn.Module:
    """``model`` with trained adapters on all its layers, or on the targets that are named."""
    config = LoRAConfig(**({"r": 2, "alpha": 3, "targets": "all"} | arguments))
    apply_lora(model, config, compute=compute)
    oracles.train_by_hand(model)
    return model


def tower(compute: str = "weights", layers: int = 3, **arguments: object) -> Tower:
    """The same tower at every call, with trained adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Tower(layers)
    return adapted(model, compute, **arguments)


def pair_of(model: Tower, index: int) -> nn.Module:
    """The pair (A, B) of one layer of a tower."""
    return model.layers[index].lora["default"]


class WrittenOut:
    """The tower of fp64 numbers: ``W0 + scale * B A`` of the values that ``model`` has now; A and B are leaves."""

    def __init__(self, model: Tower) -> None:
        self.model = model
        self.leaves = {
            name: parameter.detach().clone().double().requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }

    def weight(self, index: int) -> Tensor:
        """The sum of one layer."""
        name, pair = f"layers.{index}", self.model.layers[index].lora["default"]
        A, B = (self.leaves[f"{name}.lora.default.{matrix}"] for matrix in "AB")
        return self.leaves[f"{name}.weight"] + pair.scale * B @ A

    def layer(self, index: int, x: Tensor) -> Tensor:
        """The output of one layer."""
        return F.linear(x.double(), self.weight(index), self.leaves[f"layers.{index}.bias"])

    def __call__(self, x: Tensor, order: Sequence[int] | None = None) -> Tensor:
        for index in range(len(self.model.layers)) if order is None else order:
            x = torch.tanh(self.layer(index, x))
        return x

    def assert_gradients(self, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> None:
        """That the model has the gradients of the leaves, and ``None`` where these have none."""
        for name, parameter in (self.model if model is None else model).named_parameters():
            expected = self.leaves[name].grad
            assert (parameter.grad is None) == (expected is None), f"{name}: {parameter.grad}, expected {expected}"
            if expected is not None:
                oracles.assert_close(parameter.grad, expected, dtype)


def assert_close(present: Tensor, expected: Tensor) -> None:
    """Equal to the rounding of fp32."""
    oracles.assert_close(present, expected, torch.float32)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter, copied."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_same_gradients(present: nn.Module, expected: nn.Module) -> None:
    """That two models have gradients at the same parameters, equal to rounding."""
    other = gradients(expected)
    assert any(gradient is not None for gradient in other.values())
    for name, gradient in gradients(present).items():
        assert (gradient is None) == (other[name] is None), name
        if gradient is not None:
            assert_close(gradient, other[name])


@contextmanager
def counted_sums() -> Iterator[list[SumGroup]]:
    """A list that gets the group at each time that the weights of a group are summed."""
    groups: list[SumGroup] = []
    plain = SumGroup.sum

    def counted(group: SumGroup, *arguments: object) -> object:
        done = plain(group, *arguments)
        if done is not False:
            groups.append(group)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SumGroup, "sum", counted)
        yield groups
