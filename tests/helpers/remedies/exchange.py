"""Remedies of messages about `init_from`, `export` and `merged`."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_lora import (
    LoRACallback,
    load_adapter,
    merged_state_dict,
    save_adapter,
)
from tests.helpers.models import BuiltInConfigureModel, Lit, Net, net
from tests.helpers.remedies.case import Expected, fit, outputs, remedy
from tests.helpers.remedies.checkpoints import resume, run

EXCHANGE = "trainer/checkpointing/init_and_export.py"
MERGED_FILE = "trainer/checkpointing/merged_file.py"


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
