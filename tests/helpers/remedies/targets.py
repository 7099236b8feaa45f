"""Remedies of messages about targets: names, presets and expressions, and layers that cannot be adapted."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
)
from tests.helpers.models import Attention, EveryKind, net
from tests.helpers.remedies.case import Expected, base_outputs, outputs, remedy
from tests.helpers.remedies.models import CONFIG


@remedy("layers/registry.py", "computes its weight", "`layers.0.q`", "remove that first", "exclude=['layers.0.q']")
def a_parametrized_layer(message: Expected, folder: Path) -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.layers[0].q)
    with message:
        apply_lora(model, CONFIG)
    apply_lora(copy.deepcopy(model), LoRAConfig(r=2, targets=["q", "v"], exclude=["layers.0.q"]))
    nn.utils.parametrize.remove_parametrizations(model.layers[0].q, "weight")
    apply_lora(model, CONFIG)
    assert model.layers[0].q.lora


@remedy("patterns/cost.py", "{} are not allowed", "write the alternatives out")
def alternatives_that_are_written_out(message: Expected, folder: Path) -> None:
    with message:
        apply_lora(net(), LoRAConfig(targets=[r"re:layers\.(0)\.(q|v)(?(1)|k)"]))
    apply_lora(model := net(), LoRAConfig(targets=[r"re:layers\.(0\.q|0\.v)"]))
    assert model.layers[0].q.lora


@remedy("patterns/cost.py", "a repeat without a bound inside another", "`targets`", "write `.*` for both")
def one_repeat_for_two(message: Expected, folder: Path) -> None:
    with message:
        apply_lora(net(), LoRAConfig(targets=[r"re:layers(.*)*q"]))
    apply_lora(model := net(), LoRAConfig(targets=[r"re:layers.*q"]))
    assert model.layers[0].q.lora


@remedy("targets/problems.py", "{} Take targets='all'", "`targets='attn'`", "targets='all'", "targets=['0']")
def a_preset_without_attention(message: Expected, folder: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    with message:
        apply_lora(model(), LoRAConfig())
    for targets in ("all", ["0"]):
        apply_lora(model(), LoRAConfig(targets=targets))


@remedy("targets/problems.py", "is a {} of {}, an adapter already", "`model = model.merge_and_unload()`")
def an_adapter_of_peft(message: Expected, folder: Path) -> None:
    import peft

    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q"]))
    for targets in (["q", "v"], "all", ["layers.0.q.base_layer"]):
        with message:
            apply_lora(model, LoRAConfig(r=2, targets=targets))
    model = model.merge_and_unload()
    apply_lora(model, CONFIG)
    torch.testing.assert_close(outputs(model), base_outputs())


@remedy("targets/resolve.py", "is named by its parameter `{}` and by matrices in it", "keep one of the two")
def a_parameter_or_its_matrices(message: Expected, folder: Path) -> None:
    with message:
        apply_lora(EveryKind(), LoRAConfig(r=2, targets=["attention.in_proj_weight", "attention.q"]))
    for target in ("attention.in_proj_weight", "attention.q"):
        apply_lora(EveryKind(), LoRAConfig(r=2, targets=[target]))


@remedy("targets/resolve.py", "has code that reads its weight", "`dropout=0.1`", "set dropout=0")
def no_dropout_where_the_weight_is_read(message: Expected, folder: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.q.weight

    with message:
        apply_lora(Reads(), LoRAConfig(r=2, targets=["q"], dropout=0.1))
    apply_lora(Reads(), LoRAConfig(r=2, targets=["q"], dropout=0))


@remedy("arguments.py", "`targets` must be one of the presets {} or a list", "'q_proj'", "write targets=['q_proj']")
def one_name_in_a_list(message: Expected, folder: Path) -> None:
    with message:
        LoRAConfig(targets="q_proj")
    assert apply_lora(Attention(), LoRAConfig(r=2, targets=["q_proj"])) == ["q_proj"]
