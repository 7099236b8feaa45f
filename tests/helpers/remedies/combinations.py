"""Remedies of messages about combined adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, combine_adapters, merge_lora, remove_lora, unmerge_lora
from tests.helpers.remedies.case import Expected, remedy

COMBINE = "model/several/combine.py"
HALVES = {"fr": 0.5, "de": 0.5}


def two_adapters() -> nn.Sequential:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    for name in HALVES:
        apply_lora(model, LoRAConfig(r=1, targets="all", name=name))
    return model


@remedy(COMBINE, "`name` must be that of a new adapter", "has 'fr' already", "`remove_lora(model, name='fr')`")
def a_name_that_is_taken(message: Expected, folder: Path) -> None:
    model = two_adapters()
    with message:
        combine_adapters(model, {"de": 2.0}, "fr")
    remove_lora(model, name="fr")
    combine_adapters(model, {"de": 2.0}, "fr")
    combine_adapters(model, {"de": 2.0}, "it")


@remedy(COMBINE, "The adapters are merged into the model", "call `unmerge_lora(model)` before")
def a_combination_of_merged_adapters(message: Expected, folder: Path) -> None:
    model = two_adapters()
    merge_lora(model)
    with message:
        combine_adapters(model, HALVES, "mix")
    unmerge_lora(model)
    combine_adapters(model, HALVES, "mix")


@remedy(COMBINE, "`model` must be the module that `apply_lora`", "by `fr`", "Call `combine_adapters` with that")
def a_part_of_the_adapted_model(message: Expected, folder: Path) -> None:
    model = two_adapters()
    with message:
        combine_adapters(model[0], HALVES, "mix")
    combine_adapters(model, HALVES, "mix")


@remedy(COMBINE, "The adapters of `{}` are on the meta device", "`0`", "load them first")
def a_combination_without_values(message: Expected, folder: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 2))
    apply_lora(model, LoRAConfig(r=1, targets="all", name="fr"))
    with message:
        combine_adapters(model, {"fr": 1.0}, "mix")
    state = {"0.lora.fr.A": torch.ones(1, 4), "0.lora.fr.B": torch.ones(2, 1)}
    model.load_state_dict({**state, "0.weight": torch.ones(2, 4), "0.bias": torch.ones(2)}, assign=True)
    combine_adapters(model, {"fr": 1.0}, "mix")


@remedy("model/several/recipe.py", "`r` must be None with kind='cat'", "but got 1", "Write kind='svd'")
def the_rank_of_a_sum(message: Expected, folder: Path) -> None:
    model = two_adapters()
    with message:
        combine_adapters(model, HALVES, "mix", r=1)
    combine_adapters(model, HALVES, "mix", kind="svd", r=1)
    assert model[1].lora["mix"].r == 1
