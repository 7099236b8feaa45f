"""Remedies of messages about files of a run: `ckpt_path`, `path`, `base`, `init_from`, `export` and `merged`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_from_checkpoint,
)
from tests.helpers.models import BuiltInSetup, Lit, data, trainer
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy

ROOM = "trainer/checkpointing"
READING = "trainer/checkpointing/reading.py"
FROM_CHECKPOINT = "trainer/checkpointing/from_checkpoint.py"


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


@remedy(f"{ROOM}/merged_saves.py", "`{}` is adapted and tied to {}", "exclude=['net.layers.0.q']", "in `__init__`")
def merged_files_of_weights_that_are_not_tied(message: Expected, folder: Path) -> None:
    class Ties(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.layers[1].q.weight = self.net.layers[0].q.weight

    class Unties(Ties):
        def __init__(self) -> None:
            super().__init__()
            self.net.layers[1].q.weight = nn.Parameter(self.net.layers[0].q.weight.detach().clone())

    targets = ["layers.0.q", "k"]
    with message:
        fit(LoRACallback(targets=targets, save="merged"), module=Ties())
    for cls, exclude in ((Ties, ["net.layers.0.q"]), (Unties, None)):
        trained = cls()
        lora = LoRACallback(targets=targets, exclude=exclude, save="merged")
        path = fit_to_file(folder / cls.__name__, lora, module=trained)
        torch.testing.assert_close(outputs(cls.load_from_checkpoint(path)), outputs(trained))


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
