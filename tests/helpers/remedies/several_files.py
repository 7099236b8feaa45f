"""Remedies of messages about files of several adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    remove_lora,
    save_adapter,
    use_adapters,
)
from lightning_lora.trainer.method_callback import MethodCallback
from tests.helpers.models import Lit, net
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy, warnings_ignored
from tests.helpers.remedies.command_line import command
from tests.helpers.several import THREE, callback_of, with_adapters

DIRECTORIES, COMMON = "peft_format/directories.py", "peft_format/common_values.py"
LOAD, SLOT = "peft_format/load.py", "peft_format/slot.py"
EXCHANGE = "trainer/checkpointing/init_and_export.py"
NAMES = "trainer/checkpointing/adapters_by_name.py"
TWO = {name: THREE[name] for name in ("fr", "de")}
HEAD = {"also_train": ["head"]}
HEADS = (("fr", 0.5, HEAD), ("de", 1.0, HEAD), ("es", 0.0, {}))
MAIN, COMBINED = "cli/main.py", "cli/combined_changes.py"


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def alone(model: nn.Module, name: str) -> torch.Tensor:
    with use_adapters(model, name):
        return outputs(model)


def saved(folder: Path, name: str, seed: float = 0.0, **arguments: object) -> tuple[Path, nn.Module]:
    """A directory of one adapter, whose head moved by `seed` if it trains, and its model."""
    model = with_adapters(net(), {name: {**THREE[name], **arguments}})
    if arguments:
        model.head.weight.data += seed
    save_adapter(model, folder / name)
    return folder / name, model


@remedy(DIRECTORIES, "`{}` holds an adapter itself", "Choose another directory", "move that adapter away")
def several_where_one_is(message: Expected, folder: Path) -> None:
    model = with_adapters(net(), TWO)
    save_adapter(model, folder / "used", name="fr")
    with message:
        save_adapter(model, folder / "used")
    for directory in (folder / "other", folder / "used"):
        for file in directory.glob("adapter_*"):
            file.unlink()
        save_adapter(model, directory)
        load_adapter(loaded := net(), directory)
        assert close(outputs(loaded), outputs(model))


@remedy(DIRECTORIES, "`{}` holds no adapter itself", "Give the directory of one adapter", "checkpoint-5")
def folders_of_steps(message: Expected, folder: Path) -> None:
    model = with_adapters(net(), {"fr": THREE["fr"]})
    save_adapter(model, folder / "checkpoint-5")
    with message:
        load_adapter(net(), folder)
    load_adapter(loaded := net(), folder / "checkpoint-5")
    assert torch.equal(outputs(loaded), outputs(model))


@remedy(COMMON, "`{}` is not the same in the files of", "Load them into models of their own")
def heads_of_two_files(message: Expected, folder: Path) -> None:
    every = {name: saved(folder, name, seed, **HEAD) for name, seed in (("fr", 0.5), ("de", 1.0))}
    with message:
        load_adapter(net(), folder)
    for directory, model in every.values():
        load_adapter(loaded := net(), directory)
        assert torch.equal(outputs(loaded), outputs(model))


@remedy(COMMON, "`{}` trains in addition to the adapters", "Load the file into a model of its own")
def a_head_of_another_adapter(message: Expected, folder: Path) -> None:
    directory, model = saved(folder, "fr", 0.5, **HEAD)
    with message:
        load_adapter(with_adapters(net(), {"de": THREE["de"]}), directory, name="fr")
    load_adapter(loaded := net(), directory, name="fr")
    assert torch.equal(outputs(loaded), outputs(model))


@remedy(LOAD, "`into={}` replaces the values of that adapter", "Give one of them")
def into_or_name(message: Expected, folder: Path) -> None:
    directory, source = saved(folder, "fr")
    model = with_adapters(net(), {"slot": {"targets": "all"}})
    with message:
        load_adapter(model, directory, name="fr", into="slot")
    load_adapter(model, directory, name="fr")
    load_adapter(model, directory, into="slot")
    assert close(alone(model, "slot"), outputs(source)) and torch.equal(alone(model, "fr"), outputs(source))


@remedy(LOAD, "`into` takes the directory of one adapter", "`de`, `fr`", "Name a sub-directory")
def into_from_a_sub_directory(message: Expected, folder: Path) -> None:
    source = with_adapters(net(), TWO)
    save_adapter(source, folder)
    model = with_adapters(net(), {"slot": {"targets": "all"}})
    with message:
        load_adapter(model, folder, into="slot")
    load_adapter(model, folder / "fr", into="slot")
    assert close(alone(model, "slot"), alone(source, "fr"))


@remedy(LOAD, "The model has the adapters", "`fr`, `de`", "give `name`")
def a_name_among_several(message: Expected, folder: Path) -> None:
    directory, source = saved(folder, "fr")
    model = with_adapters(net(), TWO)
    with message:
        load_adapter(model, directory)
    for name in ("fr", "more"):
        load_adapter(model, directory, name=name)
        assert torch.equal(alone(model, name), outputs(source))


def several(**adapters: dict[str, object]) -> LoRAConfig:
    return LoRAConfig(targets=["q", "v"], adapters=adapters)


@remedy(
    EXCHANGE, "`init_from={}` has no adapter", "it holds `de`, `fr`", "Name the adapters of the run as they are called"
)
def names_that_the_file_has(message: Expected, folder: Path) -> None:
    path = fit_to_file(folder, callback_of(several(fr={}, de={"r": 2})))
    with message:
        fit(callback_of(several(fr={}, es={"r": 2}), init_from=path))
    fit(callback_of(several(de={"r": 2}, fr={}), init_from=path))


@remedy(EXCHANGE, "`init_from={}` holds one adapter", "'fr', 'de'", "save_adapter(model, directory)")
def a_directory_for_each(message: Expected, folder: Path) -> None:
    with warnings_ignored():
        model = fit(callback_of(several(fr={}, de={"r": 2})))
    save_adapter(model, folder / "one", name="fr")
    with message:
        fit(callback_of(several(fr={}, de={"r": 2}), init_from=str(folder / "one")))
    save_adapter(model, folder / "each")
    fit(callback_of(several(fr={}, de={"r": 2}), init_from=str(folder / "each")))


@remedy(NAMES, "{} keeps an adapter", "`r=2` instead of `r=4`", "load_from_checkpoint(cls, path)")
def the_kept_adapter_of_the_file(message: Expected, folder: Path) -> None:
    def callback() -> MethodCallback:
        return callback_of(LoRAConfig(r=2, targets=["q", "v"], name="de"), {"fr": 1.0})

    def module(r: int) -> Lit:
        apply_lora(made := Lit(), LoRAConfig(r=r, targets=["q", "v"], name="fr"))
        return made

    path = fit_to_file(folder, callback(), module=module(4))
    with message:
        fit(callback(), module=module(2), ckpt_path=path, max_epochs=2)
    fit(callback(), module=load_from_checkpoint(Lit, path), ckpt_path=path, max_epochs=2)


@remedy(
    NAMES, "The module has an adapter {}, which is not in", "remove_lora(module, name='fr')", "load_adapter(module, "
)
def a_module_without_others(message: Expected, folder: Path) -> None:
    trained = Lit()
    path = fit_to_file(folder, callback_of(LoRAConfig(r=2, targets=["q"], name="de")), module=trained)
    module, both = Lit(), Lit()
    for each in (module, both):
        apply_lora(each, LoRAConfig(r=2, targets=["q", "v"], name="fr"))
    with message:
        load_from_checkpoint(module, path)
    remove_lora(module, name="fr")
    assert torch.equal(outputs(load_from_checkpoint(module, path)), outputs(trained))
    command("export", path, folder / "out")
    load_adapter(both, folder / "out", name="de")
    assert close(alone(both, "de"), outputs(trained))


@remedy("layers/base.py", "Inside `use_adapters` no adapter can be added or removed", "Leave the `with` block first")
def outside_of_a_choice(message: Expected, folder: Path) -> None:
    directory, source = saved(folder, "fr")
    model = with_adapters(net(), TWO)
    with use_adapters(model, "de"):
        expected = outputs(model)
        with message:
            load_adapter(model, directory, name="es")
        with message:
            remove_lora(model, name="fr")
        assert torch.equal(outputs(model), expected)
    load_adapter(model, directory, name="es")
    remove_lora(model, name="fr")
    assert torch.equal(alone(model, "es"), outputs(source)) and torch.equal(alone(model, "de"), expected)


@remedy(SLOT, "`{}` has an adapter in the file and none in", "Give `name`")
def layers_without_a_slot(message: Expected, folder: Path) -> None:
    directory, source = saved(folder, "fr")
    model = with_adapters(net(), {"slot": {"targets": ["q"]}})
    with message:
        load_adapter(model, directory, into="slot")
    load_adapter(model, directory, name="fr")
    assert torch.equal(alone(model, "fr"), outputs(source))


@remedy(SLOT, "`{}` {}. Give `name`", "`into='slot'`")
def a_rank_above_the_slot(message: Expected, folder: Path) -> None:
    directory, source = saved(folder, "fr")
    model = with_adapters(net(), {"slot": {"r": 1, "targets": ["q", "v"]}})
    with message:
        load_adapter(model, directory, into="slot")
    load_adapter(model, directory, name="fr")
    assert torch.equal(alone(model, "fr"), outputs(source))


def saved_base(folder: Path) -> Path:
    save_file(net().state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def merged(folder: Path, name: str = "merged.safetensors") -> torch.Tensor:
    """The outputs of the merged model."""
    model = net()
    model.load_state_dict(load_file(folder / name))
    return outputs(model)


@remedy(DIRECTORIES, "`{}` holds the adapters {} in sub-directories", "de, fr", "Give the sub-directory")
def one_of_a_directory(message: Expected, folder: Path) -> None:
    model, base = with_adapters(net(), TWO), saved_base(folder)
    save_adapter(model, folder / "out")
    with message:
        command("merge", base, folder / "out", folder / "merged.safetensors")
    command("merge", base, folder / "out" / "de", folder / "merged.safetensors")
    assert close(merged(folder), alone(model, "de"))


@remedy(MAIN, "`{}` holds the adapters {}, and this takes one", "de, fr", "lightning-lora export", "give those")
def directories_of_a_checkpoint(message: Expected, folder: Path) -> None:
    path, base = fit_to_file(folder / "run", callback_of(several(fr={}, de={"r": 2}))), folder / "base.safetensors"
    save_file(Lit().state_dict(), base)
    with message:
        command("merge", base, path, folder / "merged.safetensors")
    command("export", path, folder / "out")
    command("merge", base, folder / "out" / "fr", folder / "out" / "de", folder / "merged.safetensors")
    module = Lit()
    module.load_state_dict(load_file(folder / "merged.safetensors"))
    assert close(outputs(module), outputs(load_from_checkpoint(Lit, path)))


@remedy(MAIN, "`--weights` must give one number for each adapter", "got 1 for 2")
def as_many_weights_as_adapters(message: Expected, folder: Path) -> None:
    model, base = with_adapters(net(), TWO), saved_base(folder)
    save_adapter(model, folder / "out")
    call = ("merge", base, folder / "out" / "fr", folder / "out" / "de", folder / "merged.safetensors", "--weights")
    with message:
        command(*call, 0.5)
    command(*call, 0.5, -1)
    with use_adapters(model, {"fr": 0.5, "de": -1}):
        assert close(merged(folder), outputs(model))


@remedy(MAIN, "ADAPTER names one adapter twice", "give the sum of its weights")
def an_adapter_once(message: Expected, folder: Path) -> None:
    (directory, model), base = saved(folder, "fr"), saved_base(folder)
    with message:
        command("merge", base, directory, directory, folder / "merged.safetensors", "--weights", 0.5, 0.25)
    command("merge", base, directory, folder / "merged.safetensors", "--weights", 0.75)
    with use_adapters(model, {"fr": 0.75}):
        assert close(merged(folder), outputs(model))


@remedy(COMBINED, "{} is in `{}` in full", "`head.weight`", "Merge adapters that do not train it, or one of these")
def one_head(message: Expected, folder: Path) -> None:
    base = saved_base(folder)
    fr, de, es = (saved(folder, name, seed, **more) for name, seed, more in HEADS)
    with message:
        command("merge", base, fr[0], de[0], folder / "merged.safetensors")
    command("merge", base, fr[0], folder / "merged.safetensors")
    assert close(merged(folder), outputs(fr[1]))
    command("merge", base, es[0], folder / "plain.safetensors")
    assert close(merged(folder, "plain.safetensors"), outputs(es[1]))
