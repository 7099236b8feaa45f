"""Remedies of messages about several adapters on one model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora, use_adapters
from lightning_lora.layers.base import LoRALayer
from tests.helpers.models import Lit
from tests.helpers.remedies.case import Expected, fit, remedy

X = torch.ones(2, 4)


def several(model: nn.Module | None = None, *, exclude: list[str] | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) if model is None else model
    for name in ("fr", "de"):
        apply_lora(model, LoRAConfig(r=1, targets="all", exclude=exclude, name=name))
    return model


def with_french() -> Lit:
    model = Lit()
    apply_lora(model, LoRAConfig(r=1, targets="attn", name="fr"))
    return model


@remedy("arguments.py", "`name={}` and `adapters` both name adapters", "`name='fr'`", "Leave `name` out")
def a_name_and_adapters(message: Expected, folder: Path) -> None:
    with message:
        LoRAConfig(name="fr", adapters={"de": {}})
    assert [config.name for config in LoRAConfig(adapters={"de": {}}).each()] == ["de"]


@remedy("layers/choice.py", "The adapters are chosen by {} entries", "is no batch of 3", "Give one entry for each row")
def entries_for_another_batch(message: Expected, folder: Path) -> None:
    model = several()
    with message, use_adapters(model, ["fr", "de", None]):
        model(X)
    with use_adapters(model, ["fr", "de"]):
        model(X)
    with use_adapters(model, "fr"):
        model(torch.ones(3, 4))


class TwoBeams(nn.Module):
    """An encoder, and a decoder that gets each of its rows twice, as in beam search."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x).repeat_interleave(2, 0))  # type: ignore[no-any-return]


@remedy(
    "layers/choice.py",
    "The adapters are chosen by {} entries",
    "`decoder` gets an input of shape (4, 4)",
    "choose one adapter for the whole batch, or leave them out with `exclude`",
)
def entries_under_beam_search(message: Expected, folder: Path) -> None:
    model = several(TwoBeams())
    with message, use_adapters(model, ["fr", "de"]):
        model(X)
    with use_adapters(model, "fr"):
        model(X)
    model = several(TwoBeams(), exclude=["decoder"])
    with use_adapters(model, ["fr", "de"]):
        model(X)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


@remedy("layers/choice.py", "`{}` gets an input of shape {}, and", "`head` gets", "Use batch_first=True")
def either_dimension_may_be_the_batch(message: Expected, folder: Path) -> None:
    model = SequenceFirst()
    for name in ("fr", "de"):
        apply_lora(model, LoRAConfig(r=1, targets=["head"], name=name))
    x = torch.ones(2, 2, 4)
    with message, use_adapters(model, ["fr", "de"]):
        model(x)
    with use_adapters(model, "fr"):
        model(x)
    model.rnn.batch_first = True
    with use_adapters(model, ["fr", "de"]):
        model(x)


@remedy("layers/choice.py", "`{}` computes with its weight", "`rnn` computes", "Leave it out with `exclude`")
def a_weight_for_the_whole_batch(message: Expected, folder: Path) -> None:
    model = SequenceFirst()
    model.rnn.batch_first = True
    for name in ("fr", "de"):
        apply_lora(model, LoRAConfig(r=1, targets=["rnn", "head"], name=name))
    x = torch.ones(2, 3, 4)
    with message, use_adapters(model, ["fr", "de"]):
        model(x)
    with use_adapters(model, "fr"):
        model(x)
    remove_lora(model)
    for name in ("fr", "de"):
        apply_lora(model, LoRAConfig(r=1, targets=["rnn", "head"], exclude=["rnn"], name=name))
    with use_adapters(model, ["fr", "de"]):
        model(x)


@remedy("methods/several.py", "The module has an adapter `{}`, which this run", "`fr`", "remove_lora(model, name='fr')")
def an_adapter_that_the_run_does_not_name(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(r=1, name="de"), module=with_french())
    model = with_french()
    remove_lora(model, name="fr")
    fit(LoRACallback(r=1, name="de"), module=model)
    fit(LoRACallback(r=1, name="de", keep=["fr"]), module=with_french())
    model = with_french()
    merge_lora(model, undo=False)
    fit(LoRACallback(r=1, name="de"), module=model)


@remedy("model/several/acting.py", "The adapters are merged", "before `use_adapters`", "call `unmerge_lora(model)`")
def a_choice_of_merged_adapters(message: Expected, folder: Path) -> None:
    model = several()
    merge_lora(model)
    with message, use_adapters(model, "fr"):
        pass
    unmerge_lora(model)
    with use_adapters(model, "fr"):
        model(X)


@remedy("model/several/acting.py", "The model has no adapters to choose from", "call `apply_lora` first")
def a_choice_without_adapters(message: Expected, folder: Path) -> None:
    model = nn.Linear(4, 2)
    with message, use_adapters(model, "fr"):
        pass
    apply_lora(model, LoRAConfig(r=1, targets="all", name="fr"))
    with use_adapters(model, "fr"):
        model(X)


@remedy("model/several/one_adapter.py", "The model has no adapters: call", "call `apply_lora` first")
def one_adapter_of_none(message: Expected, folder: Path) -> None:
    model = nn.Linear(4, 2)
    with message:
        remove_lora(model, name="fr")
    apply_lora(model, LoRAConfig(r=1, targets="all", name="fr"))
    remove_lora(model, name="fr")


@remedy(
    "model/several/one_adapter.py", "The adapters are merged into", "`fr` alone", "call `unmerge_lora(model)` first"
)
def one_of_merged_adapters(message: Expected, folder: Path) -> None:
    model = several()
    merge_lora(model)
    with message:
        remove_lora(model, name="fr")
    unmerge_lora(model)
    remove_lora(model, name="fr")


@remedy("model/merge.py", "Every adapter of the model rests", "`fr`, `de`", "merge_lora(model, {'fr': 1.0})")
def a_merge_of_resting_adapters(message: Expected, folder: Path) -> None:
    model = several()
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.lora.strengths = {"fr": 0.0, "de": 0.0}
            module.lora.prepare_choices()
    with message:
        merge_lora(model)
    assert merge_lora(model, {"fr": 1.0})


@remedy("model/several/trained_in_addition.py", "`keep` has {}, and this run trains", "`fr`", "also_train=None")
def what_trains_beside_kept_adapters(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(r=1, name="de", keep=["fr"], bias="all"), module=with_french())
    fit(LoRACallback(r=1, name="de", keep=["fr"], also_train=None, bias="none"), module=with_french())
