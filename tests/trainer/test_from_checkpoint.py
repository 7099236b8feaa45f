"""Adapter-only files back into modules, against the module that was trained."""

from __future__ import annotations

import os
import re

import pytest
import pytorch_lightning
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_from_checkpoint, lora_state_dict, remove_lora
from lightning_lora.layers.base import is_adapted
from tests.helpers.models import BuiltInConfigureModel, BuiltInSetup, Lit, checkpoints, data, net, trainer

X = data(5).dataset.tensors[0]


class Named(Lit):
    """Remembers what it was made with, and notes what it was given."""

    def __init__(self, width: int = 16, dropout: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__(lr=lr, batch_norm=True, dropout=dropout)
        self.save_hyperparameters()
        self.width, self.given = width, []

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.given.append((checkpoint["note"], len(checkpoint["state_dict"])))


def fit(folder, cls=Lit, lora=None, **kwargs):
    """A trained module with live adapters, and its last file."""
    module, files = cls(**kwargs), checkpoints(folder)
    trainer(LoRACallback(r=4, merge=False, **(lora or {})), files).fit(module, data(), data(1))
    return module.eval(), files.last_model_path


@pytest.mark.filterwarnings("ignore:Found keys that are")
@pytest.mark.parametrize("cls", [Lit, BuiltInConfigureModel, Named])
def test_it_gives_what_was_trained(tmp_path, cls):
    trained, path = fit(tmp_path, cls)
    loaded = load_from_checkpoint(cls, path).eval()
    assert type(loaded) is cls and is_adapted(loaded)
    assert torch.equal(loaded(X), trained(X))
    assert not torch.allclose(loaded(X), cls.load_from_checkpoint(path, strict=False).eval()(X), atol=1e-3)
    mine, its = lora_state_dict(loaded), lora_state_dict(trained)
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], value) for key, value in its.items())


def test_hyperparameters_and_hooks(tmp_path):
    _, path = fit(tmp_path, Named, width=5, dropout=0.1)
    loaded = load_from_checkpoint(Named, path, lr=0.5)
    assert (loaded.width, loaded.hparams.dropout, loaded.lr) == (5, 0.1, 0.5)
    assert loaded.given == [(7, 0), (7, len(torch.load(path, weights_only=True)["state_dict"]))]


def test_what_trains_beside_and_what_moved_comes_too_and_goes_again(tmp_path):
    trained, path = fit(tmp_path, Named, lora={"also_train": ["head"]})
    loaded, fresh = load_from_checkpoint(Named, path), Named()
    assert torch.equal(loaded.net.head.weight, trained.net.head.weight)
    assert torch.equal(loaded.net.bn.running_mean, trained.net.bn.running_mean)
    remove_lora(loaded)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_merged_it_is_the_plain_module(tmp_path):
    trained, path = fit(tmp_path)
    merged = load_from_checkpoint(Lit, path, merge=True).eval()
    assert [type(m) for m in merged.modules()] == [type(m) for m in Lit().modules()]
    assert list(merged.state_dict()) == list(Lit().state_dict())
    torch.testing.assert_close(merged(X), trained(X), rtol=1e-5, atol=1e-5)


class Drawn(Lit):
    """Draws another base every time."""

    def __init__(self) -> None:
        super().__init__()
        self.net.layers[0].q = nn.Linear(16, 16)


def test_another_base(tmp_path):
    _, path = fit(tmp_path, Drawn)
    words = r"was trained on another base: `net\.layers\.0\.q\.weight` has other values"
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint(Drawn, path)
    with pytest.warns(UserWarning, match=words):
        assert is_adapted(load_from_checkpoint(Drawn, path, strict_base=False))


def test_a_model_that_setup_makes(tmp_path):
    _, path = fit(tmp_path, BuiltInSetup)
    words = "It has a `setup`, which only a Trainer calls: if that makes the model, use Trainer(...).test(module"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_from_checkpoint(BuiltInSetup, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("lightning_lora"), "is a full checkpoint, without adapters"),
        (lambda c: c["lightning_lora"].pop("base"), "does not say what adapter it holds"),
        (lambda c: c["lightning_lora"]["config"].update(r=3), "has shape (4, 16), but the model needs (3, 16)"),
        (lambda c: c["state_dict"].popitem(), "it lacks `"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, words):
    _, path = fit(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if ".lora." in key}
    change(checkpoint)
    if "lightning_lora" not in checkpoint:
        checkpoint["state_dict"] = net().state_dict()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_from_checkpoint(Lit, path)


def test_a_truncated_file(tmp_path):
    _, path = fit(tmp_path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match="cannot be read; is the file truncated"):
        load_from_checkpoint(Lit, path)


class Twin(pytorch_lightning.LightningModule):
    """Of the other Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    training_step, configure_optimizers, loss = Lit.training_step, Lit.configure_optimizers, Lit.loss
    forward, lr = Lit.forward, 1e-2


def test_pytorch_lightning(tmp_path):
    module, files = Twin(), pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}
    callbacks = [LoRACallback(r=4, merge=False), files]
    pytorch_lightning.Trainer(callbacks=callbacks, enable_model_summary=False, **settings).fit(module, data())
    assert torch.equal(load_from_checkpoint(Twin, files.last_model_path)(X), module(X))


def test_a_class_that_adapts_itself(tmp_path):
    _, path = fit(tmp_path)
    config = torch.load(path, weights_only=True)["lightning_lora"]["config"]

    class Adapted(Lit):
        def __init__(self) -> None:
            super().__init__()
            apply_lora(self, LoRAConfig(**config))

    assert is_adapted(load_from_checkpoint(Adapted, path))
