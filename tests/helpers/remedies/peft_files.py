"""Remedies of messages about PEFT directories: what they cannot hold, and what they hold that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.cli.convert import export_checkpoint
from tests.helpers.models import EveryKind, Lit, Net, net
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy, warnings_ignored
from tests.helpers.remedies.models import CONFIG, adapted

CONTENTS = "peft_format/contents.py"
LOAD = "peft_format/load.py"
PLACEMENT = "peft_format/placement.py"
SAVE = "peft_format/save.py"


def saved(folder: Path, model: nn.Module | None = None, **arguments: object) -> Path:
    save_adapter(adapted() if model is None else model, folder, **arguments)
    return folder


def loaded(directory: Path, model: nn.Module | None = None, **arguments: object) -> nn.Module:
    load_adapter(model := net() if model is None else model, directory, **arguments)
    return model


def by_peft(directory: Path, **changes: object) -> nn.Module:
    """A model with an adapter of peft's own, which is saved in `directory`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(
            net(), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q"], **changes})
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    with warnings_ignored():  # of a bias that peft takes for a part of a sharded tensor
        model.save_pretrained(str(directory))
    return model


def reconfigure(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@remedy(LOAD, "`directory` must be a directory in PEFT's format", "load_from_checkpoint(cls, path)", "export CKPT DIR")
def a_checkpoint_by_what_reads_it(message: Expected, folder: Path) -> None:
    trained = Lit()
    path = fit_to_file(folder, LoRACallback(merge=False), module=trained)
    with message:
        loaded(Path(path))
    assert torch.equal(outputs(load_from_checkpoint(Lit, path)), outputs(trained))
    fit(LoRACallback(init_from=path))
    export_checkpoint(path, folder / "directory")
    assert torch.equal(outputs(loaded(folder / "directory")), outputs(trained))


@remedy(LOAD, "The model has merged adapters", "`unmerge_lora(model)`, or `remove_lora(model)`, first")
def load_into_a_model_that_is_not_merged(message: Expected, folder: Path) -> None:
    directory = saved(folder)
    for undo in (unmerge_lora, remove_lora):
        merge_lora(model := adapted())
        with message:
            loaded(directory, model)
        undo(model)
        assert torch.equal(outputs(loaded(directory, model)), outputs(adapted()))


@remedy(PLACEMENT, "{} is adapted by {}: the two do not belong", "`layers.0.q`", "load_adapter(..., inner=...)")
def a_model_inside_of_another(message: Expected, folder: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net(), net()

    with message:
        loaded(saved(folder), Two())
    model = loaded(folder, Two(), inner="second")
    assert torch.equal(outputs(model.second), outputs(adapted()))


@remedy(PLACEMENT, "`{}` has an adapter for its padding index", "`embedding`", "set that column to zero")
def a_padding_index_of_zeros(message: Expected, folder: Path) -> None:
    def model(padding: int | None) -> nn.Module:
        table = nn.Embedding.from_pretrained(torch.arange(20.0).view(5, 4), padding_idx=padding)
        return nn.ModuleDict({"embedding": table})

    source = adapted(LoRAConfig(r=2, targets=["embedding"]), model(None))
    save_adapter(source, folder)
    with message:
        loaded(folder, model(0))
    with torch.no_grad():
        source["embedding"].lora.default.A[:, 0] = 0
    save_adapter(source, folder)
    loaded(folder, model(0))


@remedy(
    PLACEMENT, "The adapter's file holds `{}` of its base", "`embedding.weight`", "Load the base that it was trained"
)
def the_base_of_a_saved_embedding(message: Expected, folder: Path) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"embedding": nn.Embedding(5, 4)})

    base = model()
    wrapped = peft.get_peft_model(
        model_with(model(), base.state_dict()), peft.LoraConfig(r=2, target_modules=["embedding"])
    )
    with warnings_ignored():  # it is no model of transformers
        wrapped.save_pretrained(str(folder), save_embedding_layers=True)
    path = folder / "adapter_model.safetensors"
    key = "base_model.model.embedding.base_layer.weight"
    save_file({**load_file(path), key: base["embedding"].weight.detach()}, path)
    with message:
        loaded(folder, model())
    loaded(folder, model_with(model(), base.state_dict()))


def model_with(model: nn.Module, state: dict) -> nn.Module:
    model.load_state_dict(state)
    return model


@remedy(PLACEMENT, "`{}` and `{}` are one parameter in the model", "`embedding.weight`", "untie them first")
def a_head_that_is_untied(message: Expected, folder: Path) -> None:
    tensors = EveryKind().state_dict()
    source = untied(tensors)
    apply_lora(source, LoRAConfig(r=2, targets=["fc"], also_train=["embedding", "head"]))
    nn.init.zeros_(source.embedding.weight)
    save_adapter(source, folder)
    with message:
        loaded(folder, model_with(EveryKind(), tensors))
    model = loaded(folder, untied(tensors))
    assert not model.embedding.weight.any() and model.head.weight.any()


def untied(tensors: dict | None = None) -> nn.Module:
    model = EveryKind()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model if tensors is None else model_with(model, tensors)


@remedy(
    PLACEMENT, "`{}` {}: apply the configuration", "`layers.0.q`", "apply the configuration that the adapter was made"
)
def the_configuration_of_the_adapter(message: Expected, folder: Path) -> None:
    directory = saved(folder)
    with message:
        loaded(directory, adapted(LoRAConfig(r=3, targets=["q", "v"])))
    assert torch.equal(outputs(loaded(directory, adapted())), outputs(adapted()))


@remedy(SAVE, "The model has no adapters, so there is nothing to save", "call `apply_lora` first")
def save_after_apply(message: Expected, folder: Path) -> None:
    with message:
        save_adapter(model := net(), folder)
    apply_lora(model, CONFIG)
    save_adapter(model, folder)


@remedy(SAVE, "`model` was not adapted as one", "a module around it was", "Save what `apply_lora` was called with")
def what_was_adapted_is_saved(message: Expected, folder: Path) -> None:
    model = adapted()
    with message:
        save_adapter(model.layers, folder)
    save_adapter(model, folder)
    assert torch.equal(outputs(loaded(folder)), outputs(model))


@remedy(CONTENTS, "The model is the adapted layer itself", "pass one that holds it")
def a_model_around_the_layer(message: Expected, folder: Path) -> None:
    layer = nn.Linear(4, 4)
    apply_lora(layer, LoRAConfig(r=2, targets="all"))
    with message:
        save_adapter(layer, folder)
    apply_lora(model := nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, targets="all"))
    save_adapter(model, folder)


def without_it(message: Expected, folder: Path, model: nn.Module, **arguments: object) -> None:
    """The message; then the same model without what PEFT's format cannot hold, or merged and saved as a whole."""
    apply_lora(model, LoRAConfig(r=2, **arguments))
    with message:
        save_adapter(model, folder / "refused")
    assert not (folder / "refused").exists()
    merge_lora(model)
    torch.save(model.state_dict(), folder / "whole.pt")
    remove_lora(model)
    apply_lora(model, LoRAConfig(r=2, targets=["fc"]))
    save_adapter(model, folder / "smaller")


@remedy(
    CONTENTS, "Leave it out with `exclude` and `also_train`", "`rnn`", "or merge the adapter and save the whole model"
)
def a_layer_that_is_left_out(message: Expected, folder: Path) -> None:
    without_it(message, folder, EveryKind(), targets=["rnn", "fc"])


@remedy(CONTENTS, "A parameter of the model itself trains", "take it out of `also_train`")
def a_parameter_of_the_model_itself(message: Expected, folder: Path) -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with message:
        save_adapter(adapted(LoRAConfig(r=2, targets=["q"], also_train=["scale"]), Scaled()), folder)
    save_adapter(adapted(LoRAConfig(r=2, targets=["q"]), Scaled()), folder)


@remedy(
    CONTENTS,
    "`{}` trains in full inside an nn.MultiheadAttention",
    "`attention.out_proj`",
    "all of `attention` in full",
)
def an_attention_in_full_or_adapted(message: Expected, folder: Path) -> None:
    half = LoRAConfig(r=2, targets=["attention.q", "attention.k", "attention.v"], also_train=["attention.out_proj"])
    with message:
        save_adapter(adapted(half, EveryKind()), folder)
    save_adapter(adapted(LoRAConfig(r=2, targets=["fc"], also_train=["attention"]), EveryKind()), folder / "in full")
    with warnings_ignored():  # peft adds the update of `out_proj` twice
        save_adapter(adapted(LoRAConfig(r=2, targets=["attention"]), EveryKind()), folder / "adapted")


@remedy(
    CONTENTS, "`{}` trains in full, and peft would match", "`head`", "`inner.head`", "a smaller module in `also_train`"
)
def a_name_that_peft_matches_once(message: Expected, folder: Path) -> None:
    def model(head: str = "head") -> nn.Module:
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4))})
        return nn.ModuleDict({"inner": inner, head: nn.Sequential(nn.Linear(4, 4))})

    # An expression means the outer head alone, whose name is an end of the other one's.
    with message:
        save_adapter(adapted(LoRAConfig(r=2, targets=["q"], also_train=["re:head"]), model()), folder)
    save_adapter(adapted(LoRAConfig(r=2, targets=["q"], also_train=["last"]), model("last")), folder)


@remedy("peft_format/layers.py", "is on the meta device, without values", "`layers.0.q`", "load the base first")
def a_base_with_values(message: Expected, folder: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with message:
        loaded(saved(folder), model)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    assert torch.equal(outputs(loaded(folder, model)), outputs(adapted()))


@remedy(
    "peft_format/inner.py", "`{}` belongs to the adapter and does not lie", "`layers.1.q`", "`inner`; inner='' is the"
)
def a_module_that_holds_both(message: Expected, folder: Path) -> None:
    model = adapted()
    with message:
        save_adapter(model, folder, inner="layers.0")
    for inner in ("layers", ""):
        saved(folder / f"inner {inner}", model, inner=inner)
    assert torch.equal(outputs(loaded(folder / "inner ")), outputs(model))


@remedy("peft_format/vllm.py", "`{}` is no linear layer", "`embedding`", "leave it out with `exclude`")
def linear_layers_for_vllm(message: Expected, folder: Path) -> None:
    def model(**arguments: object) -> nn.Module:
        return adapted(LoRAConfig(r=8, targets=["embedding", "fc"], **arguments), untied())

    with message:
        save_adapter(model(), folder, flavor="vllm")
    save_adapter(model(exclude=["embedding"]), folder, flavor="vllm")
