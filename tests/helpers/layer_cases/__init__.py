"""`LAYER_CASES`: one table of every kind of layer; and each of them built, adapted, and written out by its formula."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from tests.helpers.layer_cases import attention, bilinear, embedding_bag, linear, parameter, recurrent, transposed_conv
from tests.helpers.layer_cases.case import LayerCase
from tests.helpers.oracles import SCALE, train_by_hand

LAYER_CASES: dict[str, LayerCase] = {
    name: case
    for kind in (linear, embedding_bag, transposed_conv, bilinear, attention, recurrent, parameter)
    for name, case in kind.LAYER_CASES.items()
}
RANK = 2


class Subject:
    """A layer under test inside `model`, under the name `layer`; `plain` is what it was before."""

    def __init__(self, name: str) -> None:
        self.case = LAYER_CASES[name]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            layer, inputs, *others = self.case.make()
        self.inputs, self.others = tuple(inputs), others[0] if others else {}
        self.model, self.plain = nn.Sequential(), copy.deepcopy(layer)
        self.model.add_module("layer", layer)
        self.matrices = self.case.matrices(self.plain)
        self.dtype = next(layer.parameters()).dtype

    @property
    def layer(self) -> nn.Module:
        return self.model.layer

    def adapt(self) -> Subject:
        """With B zero."""
        targets = [self.case.targets] if isinstance(self.case.targets, str) else self.case.targets
        apply_lora(self.model, LoRAConfig(r=RANK, alpha=RANK * SCALE, targets=targets))
        return self

    def train(self) -> Subject:
        """With adapters as after some training."""
        self.adapt()
        train_by_hand(self.model)
        return self

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each matrix."""
        found = dict(lora_parameters(self.model))
        return {key: (found[f"layer.{key}.A"], found[f"layer.{key}.B"]) for key in self.matrices}

    def leaves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same values in fp64, to be differentiated by themselves."""
        return {
            key: tuple(matrix.detach().double().requires_grad_() for matrix in pair)
            for key, pair in self.pairs().items()
        }

    def sums(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """`W + scale * B @ A` in fp64, by the names of the plain layer's parameters."""
        total: dict[str, Tensor] = {}
        for key, (A, B) in pairs.items():
            name = self.matrices[key].parameter
            weight = total.get(name, self.plain.get_parameter(name).detach().double())
            total[name] = weight + self.matrices[key].place(SCALE * B.double() @ A.double())
        return total

    def expected(self, pairs: dict[str, tuple[Tensor, Tensor]], inputs: Any = None, others: Any = None) -> list[Tensor]:
        """What the plain layer gives in fp64 with the sums for its weights."""
        inputs, others = (self.inputs if inputs is None else inputs), (self.others if others is None else others)
        plain = copy.deepcopy(self.plain).double()
        return tensors(self.case.call(plain, self.sums(pairs), cast(inputs), cast(others)))

    def run(self, layer: nn.Module | None = None) -> list[Tensor]:
        return tensors((self.layer if layer is None else layer)(*self.inputs, **self.others))


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in what a layer gives."""
    if outputs is None:
        return []
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    return [outputs] if isinstance(outputs, Tensor) else [x for each in outputs for x in tensors(each)]


def cast(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Whatever is floating in `value`, in `dtype`; one object stays one."""
    done: dict[int, Any] = {}

    def one(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return value.to(dtype)
        if isinstance(value, (tuple, list)):
            return type(value)(one(each) for each in value)
        if isinstance(value, dict):
            return {key: one(each) for key, each in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return done.setdefault(id(value), value.to(dtype))

    return one(value)
