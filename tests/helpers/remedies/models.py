"""Remedies of messages about targets, and of the verbs on any module: merge, unmerge, disable, remove, load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    disable_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from tests.helpers.models import EveryKind, Lit, Net, net
from tests.helpers.remedies.case import Expected, base_outputs, fit_to_file, outputs, remedy

CONFIG = LoRAConfig(r=2, targets=["q", "v"])


def adapted(config: LoRAConfig = CONFIG, model: nn.Module | None = None) -> nn.Module:
    """A model with adapters that act."""
    model = net() if model is None else model
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def refused_before(
    message: Expected, verb: Callable[[nn.Module], object], ready: Callable[[nn.Module], object]
) -> None:
    """`verb` gives the message for a plain model, and works after `ready`."""
    model = net()
    with message:
        verb(model)
    ready(model)
    verb(model)


@remedy("model/merge.py", "The model has no adapters to merge", "call `apply_lora`, or load an adapter, first")
def merge_after_apply(message: Expected, folder: Path) -> None:
    refused_before(message, merge_lora, lambda model: apply_lora(model, CONFIG))
    save_adapter(adapted(), folder)
    load_adapter(model := net(), folder)
    merge_lora(model)
    torch.testing.assert_close(outputs(model), outputs(adapted()))


@remedy("model/mergeable.py", "`{}` is on the meta device", "`layers.0.q.weight`", "load the base first")
def merge_after_the_base_was_loaded(message: Expected, folder: Path) -> None:
    with torch.device("meta"):
        model = Net()
    apply_lora(model, CONFIG)
    with message:
        merge_lora(model)
    model.to_empty(device="cpu")
    model.load_state_dict(adapted().state_dict())
    merge_lora(model)
    torch.testing.assert_close(outputs(model), outputs(adapted()))


@remedy(
    "model/merge.py", "`{}` is not what the merge left there", "`layers.0.q.weight`", "`merge_lora(model, undo=False)`"
)
def a_merged_weight_that_was_changed(message: Expected, folder: Path) -> None:
    merge_lora(model := adapted())
    with torch.no_grad():
        model.layers[0].q.weight.add_(1)
    with message:
        unmerge_lora(model)
    before = outputs(model)
    merge_lora(model, undo=False)
    assert torch.equal(outputs(model), before)
    apply_lora(model, CONFIG)
    assert torch.equal(outputs(model), before)


@remedy("model/mergeable.py", "`{}` was shared with another module", "`embedding.weight`", "must not tie the two")
def merged_weights_go_into_an_untied_model(message: Expected, folder: Path) -> None:
    model, untied = EveryKind(), EveryKind()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    apply_lora(model, LoRAConfig(r=2, targets=["embedding"]))
    nn.init.normal_(model.embedding.lora.default.B)
    with message:
        merge_lora(model)
    untied.load_state_dict(model.state_dict())
    index = torch.tensor([[0, 1, 2]])
    for ours, theirs in zip(model.eval()(index), untied.eval()(index), strict=True):
        torch.testing.assert_close(ours, theirs)


@remedy("model/merge.py", "`undo` must be given by name", "but got False by position", "Write `undo=False`")
def undo_by_name(message: Expected, folder: Path) -> None:
    with message:
        merge_lora(adapted(), False)  # type: ignore[arg-type]
    merge_lora(model := adapted(), undo=False)
    torch.testing.assert_close(outputs(model), outputs(adapted()))


@remedy("model/apply.py", "The adapters are merged into the model", "call `unmerge_lora(model)` before `disable_lora`")
def disable_after_unmerge(message: Expected, folder: Path) -> None:
    merge_lora(model := adapted())
    with message:
        disable_lora(model).__enter__()
    unmerge_lora(model)
    with disable_lora(model):
        assert torch.equal(outputs(model), base_outputs())


@remedy("model/apply.py", "The model has no adapters to disable", "call `apply_lora` first")
def disable_after_apply(message: Expected, folder: Path) -> None:
    refused_before(message, lambda model: disable_lora(model).__enter__(), lambda model: apply_lora(model, CONFIG))


@remedy("model/merged_values.py", "The model has no adapters, live or merged", "`model.state_dict()`")
def the_plain_state_dict(message: Expected, folder: Path) -> None:
    with message:
        merged_state_dict(model := net())
    Net().load_state_dict(model.state_dict())


@remedy(
    "model/merged_values.py", "`{}.state_dict()` has no entry `{}`", "`layers.0.q.weight`", "Leave this entry in it"
)
def a_state_dict_with_all_entries(message: Expected, folder: Path) -> None:
    model = adapted()

    def drop(module: nn.Module, state: dict, *_: object) -> None:
        state.pop("layers.0.q.weight")

    hook = model.register_state_dict_post_hook(drop)
    with message:
        merged_state_dict(model)
    hook.remove()
    Net().load_state_dict(merged_state_dict(model))


@remedy("model/state.py", "The model has no adapters, so there is no adapter to save", "call `apply_lora` first")
def a_state_after_apply(message: Expected, folder: Path) -> None:
    refused_before(message, lora_state_dict, lambda model: apply_lora(model, CONFIG))


@remedy(
    "model/loading.py", "call `apply_lora` with its configuration first", "The model has no adapters to load into: call"
)
def load_after_apply(message: Expected, folder: Path) -> None:
    state = lora_state_dict(adapted())
    with message:
        load_lora_state_dict(model := net(), state)
    apply_lora(model, CONFIG)
    load_lora_state_dict(model, state)
    assert torch.equal(outputs(model), outputs(adapted()))


@remedy("model/loading.py", "The model has no {}adapters to load into", "call `unmerge_lora(model)` first")
def load_after_unmerge(message: Expected, folder: Path) -> None:
    state = lora_state_dict(adapted())
    merge_lora(model := adapted())
    with message:
        load_lora_state_dict(model, state)
    unmerge_lora(model)
    load_lora_state_dict(model, state)


@remedy("model/loading.py", "`state` is a whole checkpoint", "pass its entry 'state_dict'")
def the_state_dict_of_a_checkpoint(message: Expected, folder: Path) -> None:
    trained = Lit()
    checkpoint = torch.load(fit_to_file(folder, LoRACallback(merge=False), module=trained))
    apply_lora(module := Lit(), LoRAConfig())
    with message:
        load_lora_state_dict(module, checkpoint)
    load_lora_state_dict(module, checkpoint["state_dict"])
    assert torch.equal(outputs(module), outputs(trained))


@remedy(
    "model/same_config.py", "The model already has adapters", "`remove_lora(model)`", "`merge_lora(model, undo=False)`"
)
def another_configuration(message: Expected, folder: Path) -> None:
    other = LoRAConfig(r=3, targets=["q", "v"])
    with message:
        apply_lora(adapted(), other)
    remove_lora(model := adapted())
    apply_lora(model, other)
    assert torch.equal(outputs(model), base_outputs())
    merge_lora(model := adapted(), undo=False)
    apply_lora(model, other)
    torch.testing.assert_close(outputs(model), outputs(adapted()))
    apply_lora(model := adapted(), CONFIG)
    assert torch.equal(outputs(model), outputs(adapted()))


@remedy("model/same_config.py", "`{}` has adapters ({})", "`remove_lora`", "`merge_lora(layer, undo=False)`")
def a_layer_of_another_model(message: Expected, folder: Path) -> None:
    def moved() -> tuple[nn.Module, nn.Module]:
        layer = adapted().layers[0].q
        model = net()
        model.head = nn.Sequential(layer, model.head)
        return model, layer

    model, _ = moved()
    with message:
        apply_lora(model, CONFIG)
    for undo in (remove_lora, lambda layer: merge_lora(layer, undo=False)):
        model, layer = moved()
        before = outputs(model)
        undo(layer)
        apply_lora(model, CONFIG)
        assert undo is remove_lora or torch.allclose(outputs(model), before, atol=1e-6)


@remedy("model/adapter_loading.py", "The state dict that was loaded differs", "as it is, without a copy")
def a_state_dict_without_a_copy(message: Expected, folder: Path) -> None:
    trained = Lit()
    content = torch.load(fit_to_file(folder, LoRACallback(save="merged", merge=False), module=trained))
    module = adapted(LoRAConfig(), Lit())
    with message:
        module.load_state_dict(dict(content["state_dict"]), strict=False)
    fresh = adapted(LoRAConfig(), Lit())
    fresh.load_state_dict(content["state_dict"])
    torch.testing.assert_close(outputs(fresh), outputs(trained))


@remedy("model/adapter_loading.py", "`{}` has other values in the state dict", "`remove_lora(module)` first")
def a_state_dict_of_another_base(message: Expected, folder: Path) -> None:
    class Other(Lit):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.net.layers[0].ln.bias)
            nn.init.constant_(self.net.layers[0].ln.weight, 2.0)

    content = torch.load(fit_to_file(folder, LoRACallback(save="merged"), module=Other()))
    module = adapted(LoRAConfig(), Lit())
    with message:
        module.load_state_dict(content["state_dict"])
    remove_lora(module)
    module.load_state_dict(content["state_dict"])
    assert torch.equal(module.net.layers[0].ln.weight, torch.full((16,), 2.0))


@remedy(
    "model/twins.py", "{} have the same layers, whose values are not here yet", "copy the adapters too", "`exclude`"
)
def twins_without_values(message: Expected, folder: Path) -> None:
    def pair() -> nn.ModuleDict:
        with torch.device("meta"):
            return nn.ModuleDict({"student": Net(), "teacher": Net()})

    with message:
        apply_lora(pair(), CONFIG)
    apply_lora(pair(), LoRAConfig(r=2, targets=["q", "v"], exclude=["teacher"]))
