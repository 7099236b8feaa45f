"""Remedies of messages about files of a run: `ckpt_path`, `path`, `base`, `init_from`, `export` and `merged`."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    merge_lora,
    merged_state_dict,
    save_adapter,
    unmerge_lora,
)
from tests.helpers.models import BuiltInConfigureModel, BuiltInSetup, Lit, Net, data, net, trainer
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy

ROOM = "trainer/checkpointing"
READING, FROM_CHECKPOINT, BASE, EXCHANGE, MERGED_FILE = (
    f"{ROOM}/{name}.py" for name in ("reading", "from_checkpoint", "base_weights", "init_and_export", "merged_file")
)


def run(folder: Path, module: nn.Module | None = None, **arguments: object) -> tuple[nn.Module, str]:
    """The trained module with its live adapters, and the path of its checkpoint."""
    module = Lit() if module is None else module
    return module, fit_to_file(folder, LoRACallback(**{"merge": False, **arguments}), module=module)


def resume(path: str, module: nn.Module | None = None, **arguments: object) -> nn.Module:
    return fit(LoRACallback(merge=False, **arguments), module=module, ckpt_path=path, max_epochs=2)


class Drawn(Lit):
    """Draws one layer anew every time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.seed()
            self.net.layers[0].q = nn.Linear(16, 16)


@remedy(
    READING, "{} is a full checkpoint, without adapters", "`ckpt_path='", "model.load_state_dict(torch.load(path)['"
)
def a_full_checkpoint_as_the_base(message: Expected, folder: Path) -> None:
    full = Drawn()
    path = fit_to_file(folder, module=full)
    with message:
        resume(path)
    module = Lit()
    module.load_state_dict(torch.load(path)["state_dict"])
    assert torch.equal(outputs(module), outputs(full))
    fit(LoRACallback(), module=module)


@remedy(READING, "{} holds the base and live adapters together", "`ckpt_path='", "`apply_lora(model, LoRAConfig(...))`")
def a_file_that_was_saved_outside_of_a_run(message: Expected, folder: Path) -> None:
    runner, module = trainer(LoRACallback(merge=False), max_epochs=1), Lit()
    runner.fit(module, data())
    runner.save_checkpoint(folder / "outside.ckpt")
    with message:
        resume(str(folder / "outside.ckpt"))
    loaded = Lit()
    apply_lora(loaded, LoRAConfig())
    loaded.load_state_dict(torch.load(folder / "outside.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(outputs(loaded), outputs(module))
    fit(LoRACallback(), module=loaded.train())


@remedy(READING, "{} was written with {}", "`ckpt_path='", "`r=8` instead of `r=4`", "the same arguments")
def the_arguments_of_the_file(message: Expected, folder: Path) -> None:
    _, path = run(folder)
    with message:
        resume(path, r=4)
    resume(path)


@remedy(READING, "{} was trained on another base", "`ckpt_path='", "`net.layers.0.q.weight` has other values")
def the_base_of_the_file(message: Expected, folder: Path) -> None:
    base = Drawn()
    torch.save(base.state_dict(), folder / "base.pt")
    _, path = run(folder, base)
    with message:
        resume(path)
    module = Lit()
    module.load_state_dict(torch.load(folder / "base.pt"))
    resume(path, module)


@remedy(READING, "{} was trained on another base", "`path='", "Load the base it was trained on first")
def the_base_of_a_loaded_file(message: Expected, folder: Path) -> None:
    trained = Drawn()
    torch.save(trained.state_dict(), folder / "base.pt")
    _, path = run(folder, trained)
    with message:
        load_from_checkpoint(Lit, path)
    module = Lit()
    module.load_state_dict(torch.load(folder / "base.pt"))
    assert torch.equal(outputs(load_from_checkpoint(module, path)), outputs(trained))


@remedy(READING, "{} was trained on another base", "`init_from='", "Load the base it was trained on first")
def the_base_of_given_adapters(message: Expected, folder: Path) -> None:
    base = Drawn()
    torch.save(base.state_dict(), folder / "base.pt")
    _, path = run(folder, base)
    with message:
        fit(LoRACallback(init_from=path))
    module = Lit()
    module.load_state_dict(torch.load(folder / "base.pt"))
    fit(LoRACallback(init_from=path), module=module)


@remedy(FROM_CHECKPOINT, "`{}` is an argument for making the module", "`lr`", "Leave it out, or give the class")
def arguments_of_a_class(message: Expected, folder: Path) -> None:
    trained, path = run(folder)
    with message:
        load_from_checkpoint(Lit(), path, lr=0.5)
    for loaded in (load_from_checkpoint(Lit(), path), load_from_checkpoint(Lit, path, lr=0.5)):
        assert torch.equal(outputs(loaded), outputs(trained))


@remedy(
    FROM_CHECKPOINT, "`cls_kwargs` has `{}`", "`strict`", "load_from_checkpoint(TakesStrict(strict=..., ...), path)"
)
def the_module_for_arguments_of_lightning(message: Expected, folder: Path) -> None:
    class TakesStrict(Lit):
        def __init__(self, strict: int = 1) -> None:
            super().__init__()
            self.strict = strict

    trained, path = run(folder, TakesStrict())
    with message:
        load_from_checkpoint(TakesStrict, path, cls_kwargs={"strict": 2})
    loaded = load_from_checkpoint(TakesStrict(strict=2), path)
    assert loaded.strict == 2 and torch.equal(outputs(loaded), outputs(trained))


@remedy(
    FROM_CHECKPOINT, "The checkpoint's targets are not in {}", "module.setup('test'); load_from_checkpoint(module, "
)
def a_model_that_setup_builds(message: Expected, folder: Path) -> None:
    trained, path = run(folder, BuiltInSetup())
    with message:
        load_from_checkpoint(BuiltInSetup, path)
    module = BuiltInSetup()
    module.setup("test")
    assert torch.equal(outputs(load_from_checkpoint(module, path)), outputs(trained))


@remedy(BASE, "`base` has merged adapters", "call `unmerge_lora(base)` first")
def a_base_that_is_unmerged(message: Expected, folder: Path) -> None:
    trained, path = run(folder)
    base = copy.deepcopy(trained)
    merge_lora(base)
    with message:
        load_from_checkpoint(Drawn, path, base=base)
    unmerge_lora(base)
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=base)), outputs(trained))


@remedy(
    BASE, "`base={}` holds adapters alone", ".ckpt'` holds adapters", "Give the file or the module that they train on"
)
def a_base_that_is_no_adapter(message: Expected, folder: Path) -> None:
    base = Drawn()
    torch.save(base.state_dict(), folder / "base.pt")
    trained, path = run(folder, copy.deepcopy(base))
    with message:
        load_from_checkpoint(Drawn, path, base=path)
    for given in (folder / "base.pt", base):
        assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=given)), outputs(trained))


@remedy(BASE, "`base={}` must hold a state dict", "list.pt'` must", "torch.save(model.state_dict(), path)")
def a_base_that_is_a_state_dict(message: Expected, folder: Path) -> None:
    model = Drawn()
    torch.save([1, 2], folder / "list.pt")
    torch.save(model.state_dict(), path := folder / "base.pt")
    trained, file = run(folder, model)
    with message:
        load_from_checkpoint(Drawn, file, base=folder / "list.pt")
    assert torch.equal(outputs(load_from_checkpoint(Drawn, file, base=path)), outputs(trained))


@remedy(
    BASE, "`base` has no tensor under any name", "the nearest that it has is", "Rename its entries, or load it into"
)
def a_base_with_the_names_of_the_module(message: Expected, folder: Path) -> None:
    state = Drawn().state_dict()
    torch.save({f"{name}_old": value for name, value in state.items()}, folder / "old.pt")
    (model := Lit()).load_state_dict(state)
    trained, path = run(folder, model)
    with message:
        load_from_checkpoint(Drawn, path, base=folder / "old.pt")
    renamed = {name.removesuffix("_old"): value for name, value in torch.load(folder / "old.pt").items()}
    torch.save(renamed, folder / "new.pt")
    assert torch.equal(outputs(load_from_checkpoint(Drawn, path, base=folder / "new.pt")), outputs(trained))
    (module := Drawn()).load_state_dict(renamed)
    assert torch.equal(outputs(load_from_checkpoint(module, path)), outputs(trained))


@remedy(
    BASE, "`base` fits {}. Load it", "`net` and `teacher`", "Load it into the module yourself, and give that module"
)
def a_base_of_two_parts(message: Expected, folder: Path) -> None:
    class Taught(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net)

    network = net()
    nn.init.ones_(network.layers[0].ln.bias)

    def ready() -> Taught:
        module = Taught()
        module.net.load_state_dict(network.state_dict())
        return module

    trained, path = run(folder, ready(), exclude=["teacher"])
    with message:
        load_from_checkpoint(Taught, path, base=network)
    assert torch.equal(outputs(load_from_checkpoint(ready(), path)), outputs(trained))


@remedy(BASE, "has no memory here, on the meta device", "`base` does not fit", "make the module on another one")
def a_module_with_memory(message: Expected, folder: Path) -> None:
    trained, path = run(folder)

    class OnMeta(Lit):
        device_of = "meta"

        def __init__(self) -> None:
            super().__init__()
            with torch.device(self.device_of):
                self.net = Net()

    class OnCpu(OnMeta):
        device_of = "cpu"

    with message:
        load_from_checkpoint(OnMeta, path, base=net())
    assert torch.equal(outputs(load_from_checkpoint(OnCpu, path, base=net())), outputs(trained))


@remedy(EXCHANGE, "`init_from={}` is not there", "nothing'` is not there", "give a PEFT directory, or a checkpoint")
def adapters_that_are_there(message: Expected, folder: Path) -> None:
    trained, path = run(folder)
    save_adapter(trained, folder / "directory")
    with message:
        fit(LoRACallback(init_from=str(folder / "nothing")))
    for given in (path, str(folder / "directory")):
        fit(LoRACallback(init_from=given))


@remedy(EXCHANGE, "`init_from={}` comes before `{}` has memory", "Load the base in `configure_model`", "`ckpt_path`")
def a_base_that_is_loaded_in_configure_model(message: Expected, folder: Path) -> None:
    class Empty(Lit):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.net = Net()

    _, path = run(folder)
    with message:
        fit(LoRACallback(init_from=path), module=Empty())
    fit(LoRACallback(init_from=path), module=BuiltInConfigureModel())
    resume(path, BuiltInConfigureModel())


@remedy(EXCHANGE, "`export={}` cannot be written: {}. Name", "out'` cannot be written", "Name a directory that can be")
def an_export_that_can_be_written(message: Expected, folder: Path) -> None:
    (folder / "file").write_text("")
    with message:
        fit(LoRACallback(export=str(folder / "file" / "out")))
    module = fit(LoRACallback(export=str(folder / "out")))
    load_adapter(other := net(), folder / "out")
    torch.testing.assert_close(outputs(other), outputs(module))


@remedy(
    EXCHANGE, "`export={}` cannot be written: {} Without", "'` cannot be written: `head`", "Without `export` the run"
)
def a_run_without_the_export(message: Expected, folder: Path) -> None:
    class WithBilinear(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.head = nn.Bilinear(16, 16, 3)
            self.net.forward = self.bilinear  # type: ignore[method-assign]

        def bilinear(self, x: torch.Tensor) -> torch.Tensor:
            return self.net.head(self.net.layers(x), x)  # type: ignore[no-any-return]

    with message:
        fit(LoRACallback(targets=["q", "head"], export=str(folder / "out")), module=WithBilinear())
    fit(LoRACallback(targets=["q", "head"]), module=WithBilinear())


class Fills(Callback):
    """Takes the place of what will be written, after the run has looked at it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, *_: object) -> None:
        self.path.parent.mkdir()
        self.path.write_text("")


@remedy(EXCHANGE, "`export={}` was not written", "out'` was not written", "Use save_adapter(module, ...)")
def an_export_by_hand(message: Expected, folder: Path) -> None:
    module = Lit()
    with message:
        fit(LoRACallback(export=str(folder / "new" / "out")), Fills(folder / "new" / "out"), module=module)
    save_adapter(module, folder / "elsewhere")
    load_adapter(other := Lit(), folder / "elsewhere")
    torch.testing.assert_close(outputs(other), outputs(module))


@remedy(MERGED_FILE, "`merged={}` must be a file", "'` must be a file, but is a directory", "name a file in it")
def a_merged_file_in_a_directory(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(merged=str(folder)))
    fit(LoRACallback(merged=str(folder / "merged.safetensors")))
    assert (folder / "merged.safetensors").exists()


@remedy(MERGED_FILE, "`merged={}` cannot be written: {}. Name", "merged'` cannot be written", "Name a file that can be")
def a_merged_file_that_can_be_written(message: Expected, folder: Path) -> None:
    (folder / "file").write_text("")
    with message:
        fit(LoRACallback(merged=str(folder / "file" / "merged")))
    fit(LoRACallback(merged=str(folder / "merged")))


@remedy(
    MERGED_FILE, "`merged={}` was not written", "merged'` was not written", "torch.save(merged_state_dict(module), ...)"
)
def a_merged_file_by_hand(message: Expected, folder: Path) -> None:
    class MakesDirectory(Callback):
        def on_train_start(self, *_: object) -> None:
            (folder / "merged" / "full").mkdir(parents=True)

    module = Lit()
    with message:
        fit(LoRACallback(merged=str(folder / "merged")), MakesDirectory(), module=module)
    torch.save(merged_state_dict(module), folder / "merged.pt")
    (plain := Lit()).load_state_dict(torch.load(folder / "merged.pt"))
    assert torch.equal(outputs(plain), outputs(module))


class DropsEntry(Lit):
    """Its own state dict lacks an adapted weight."""

    def state_dict(self, *args: object, **kwargs: object) -> dict:
        state = super().state_dict(*args, **kwargs)
        state.pop("net.layers.0.q.weight", None)
        return state


@remedy(f"{ROOM}/merged_saves.py", "`save='merged'` cannot write its files", "Or use save='adapter'")
def adapter_files_for_a_state_dict_with_gaps(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(save="merged"), module=DropsEntry())
    fit(LoRACallback(save="adapter"), module=DropsEntry())


@remedy(
    f"{ROOM}/merged_saves.py", "`{}.state_dict()` has no entry", "`DropsEntry", "`net.layers.0.q.weight`", "Leave this"
)
def merged_files_of_a_whole_state_dict(message: Expected, folder: Path) -> None:
    with message:
        fit(LoRACallback(save="merged"), module=DropsEntry())
    trained, path = run(folder, save="merged")
    torch.testing.assert_close(outputs(Lit.load_from_checkpoint(path)), outputs(trained))


@remedy(
    f"{ROOM}/contents.py", "The checkpoint to be written lacks `{}`", "`on_save_checkpoint` of Removes", "Leave the"
)
def a_hook_that_leaves_the_adapters(message: Expected, folder: Path) -> None:
    class Removes(Lit):
        everything = True

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            state = checkpoint["state_dict"]
            kept = {} if self.everything else {name: value for name, value in state.items() if ".lora." in name}
            checkpoint["state_dict"] = kept

    class RemovesBase(Removes):
        everything = False

    with message:
        run(folder / "all", Removes())
    trained, path = run(folder / "base", RemovesBase())
    assert torch.equal(outputs(load_from_checkpoint(RemovesBase, path)), outputs(trained))


@remedy(
    f"{ROOM}/checkpoint_io.py", "`on_load_checkpoint` of {} replaced layers", "Copy the old weights", "`also_train`"
)
def layers_that_a_hook_builds_again(message: Expected, folder: Path) -> None:
    class Rebuilds(Lit):
        copies = False

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            old = self.state_dict()
            with torch.random.fork_rng():
                self.net.head = nn.Linear(16, 3)
            if self.copies:
                self.load_state_dict(old, strict=False)

    class Copies(Rebuilds):
        copies = True

    def tested(path: str, module: nn.Module, **arguments: object) -> None:
        trainer(LoRACallback(**arguments)).test(module, data(2), ckpt_path=path, verbose=False)

    _, path = run(folder / "refused", Rebuilds(), targets=["q", "head"])
    with message:
        tested(path, Rebuilds(), targets=["q", "head"])
    tested(path, Copies(), targets=["q", "head"])
    in_full = {"targets": ["q"], "also_train": ["head"]}
    _, path = run(folder / "full", Rebuilds(), **in_full)
    tested(path, Rebuilds(), **in_full)
