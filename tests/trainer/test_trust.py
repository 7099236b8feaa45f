"""Which files are opened with all that they hold, and which as plain data: no file of a stranger runs code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, load_from_checkpoint, save_adapter
from tests.helpers.models import Lit, checkpoints, data, trainer


class Marker:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Choice:
    """A hyperparameter that is no plain data."""


class Chooses(Lit):
    def __init__(self, choice: object = None) -> None:
        super().__init__()
        self.save_hyperparameters({"choice": choice or Choice()})


def resumed_from_a_stranger(folder: Path, **kwargs: object):
    """Fit from a file whose ModelCheckpoint says that the best is a file which runs code when it is unpickled."""
    files = checkpoints(folder)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(Lit(), data(), data(1))
    checkpoint = torch.load(files.last_model_path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint"))
    state = checkpoint["callbacks"][key]
    state["best_model_path"] = str(folder / "evil.ckpt")
    torch.save({**checkpoint, "evil": Marker(folder / "code ran")}, folder / "evil.ckpt")
    torch.save(checkpoint, folder / "strange.ckpt")
    again = ModelCheckpoint(folder / "again", monitor="val_loss", save_top_k=0)
    runner = trainer(LoRACallback(r=4, merge="best"), again, max_epochs=2)
    runner.fit(Lit(), data(), data(1), ckpt_path=folder / "strange.ckpt", **kwargs)


@pytest.mark.parametrize("said", [{}, {"weights_only": True}], ids=["nothing", "weights_only=True"])
def test_no_code_runs_from_the_best_path_of_a_stranger(tmp_path, said):
    with pytest.raises(ValueError, match=r"evil.ckpt'` holds an object of posix.mkdir"):
        resumed_from_a_stranger(tmp_path, **said)
    assert not (tmp_path / "code ran").exists()


def test_a_user_who_trusts_the_file_says_so(tmp_path):
    resumed_from_a_stranger(tmp_path, weights_only=False)
    assert (tmp_path / "code ran").exists()


def test_what_this_process_wrote_is_opened_as_it_was_written(tmp_path):
    files, module = checkpoints(tmp_path), Chooses()
    runner = trainer(LoRACallback(r=4, merge="best"), files, max_epochs=2)
    runner.fit(module, data(), data(1))
    tested = runner.test(module, data(2), ckpt_path="best", verbose=False)
    assert tested == trainer(LoRACallback(r=4)).test(
        Chooses(), data(2), ckpt_path=files.best_model_path, weights_only=False, verbose=False
    )


def test_an_object_in_a_file_is_named_and_the_remedy_works(tmp_path, monkeypatch):
    files = checkpoints(tmp_path)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(Chooses(), data(), data(1))
    path = files.last_model_path
    monkeypatch.setattr(
        "lightning_lora.trainer.checkpointing.checkpoint_io._WRITTEN_HERE", set()
    )  # as in another process
    words = r"holds an object of tests.trainer.test_trust.Choice, .* give `weights_only=False` where you give the path"
    for use in (
        lambda **said: trainer(LoRACallback(r=4)).test(Chooses(), data(2), ckpt_path=path, verbose=False, **said),
        lambda **said: trainer(LoRACallback(r=4), max_epochs=2).fit(Chooses(), data(), ckpt_path=path, **said),
        lambda **said: load_from_checkpoint(Chooses, path, **said),
    ):
        with pytest.raises(ValueError, match=words):
            use()
        use(weights_only=False)


def test_init_from_takes_what_this_process_wrote_and_else_a_directory_made_as_the_error_says(tmp_path, monkeypatch):
    files = checkpoints(tmp_path)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(Chooses(), data(), data(1))
    path = files.last_model_path
    trainer(LoRACallback(r=4, init_from=path), max_epochs=1).fit(Chooses(), data())
    monkeypatch.setattr(
        "lightning_lora.trainer.checkpointing.checkpoint_io._WRITTEN_HERE", set()
    )  # as in another process
    with pytest.raises(
        ValueError,
        match=r"`init_from=.*trust the file, give `init_from` a directory, made by save_adapter\(load_from",
    ):
        trainer(LoRACallback(r=4, init_from=path), max_epochs=1).fit(Chooses(), data())
    save_adapter(load_from_checkpoint(Chooses, path, weights_only=False), tmp_path / "directory")
    trainer(LoRACallback(r=4, init_from=str(tmp_path / "directory")), max_epochs=1).fit(Chooses(), data())


def test_a_truncated_file_is_called_so(tmp_path):
    files = checkpoints(tmp_path)
    trainer(LoRACallback(r=4, merge=False), files, max_epochs=1).fit(Lit(), data(), data(1))
    content = Path(files.last_model_path).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is the file truncated"):
        load_from_checkpoint(Lit, tmp_path / "cut.ckpt")
