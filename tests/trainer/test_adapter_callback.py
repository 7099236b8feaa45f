"""AdapterCallback in a Trainer; the life of its run is among the cases of `tests/methods/test_life_of_a_run.py`."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_lora import AdapterCallback, load_from_checkpoint, remove_adapted
from tests.helpers.models import LitEncoder, checkpoints, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))


def test_arguments_are_those_of_the_configuration():
    callback = AdapterCallback(3, "block", activation="relu", scale=2.0, exclude=["head"], bias="all", lr_scale=10.0)
    config = callback.config
    assert (config.size, config.placement, config.activation, config.scale) == (3, "block", "relu", 2.0)
    assert (config.exclude, config.bias, callback.run_config.lr_scale) == (["head"], "all", 10.0)


def test_the_module_keeps_its_bottlenecks_and_the_end_of_fit_says_so(tmp_path, log):
    module, files = LitEncoder(), checkpoints(tmp_path)
    trainer(AdapterCallback(3, also_train=["head"]), files).fit(module, data(), data(1))
    assert "A bottleneck cannot be merged into the weights: the module keeps it." in "\n".join(log)
    trained = module.eval()(X)
    assert torch.equal(load_from_checkpoint(LitEncoder, files.last_model_path).eval()(X), trained)
    assert not torch.equal(trained, LitEncoder().eval()(X))
    remove_adapted(module)
    assert module.state_dict().keys() == LitEncoder().state_dict().keys()


def test_the_start_of_a_run_shows_what_trains(log):
    trainer(AdapterCallback(3, "parallel"), max_epochs=1, limit_train_batches=1).fit(LitEncoder(), data())
    assert "net.layers.*.mlp.fc2  2 modules  Linear  230 parameters" in "\n".join(log)
    assert "fc1" not in "\n".join(log)  # its class is swapped, but nothing is added to it


def test_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    arguments = ["--trainer.callbacks+=AdapterCallback", "--trainer.callbacks.size=5"]
    arguments += ["--trainer.callbacks.placement=pfeiffer", "--trainer.logger=false"]
    cli = LightningCLI(LitEncoder, args=arguments, run=False, save_config_callback=None)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, AdapterCallback)]
    assert (callback.config.size, callback.config.placement) == (5, "pfeiffer")


def test_a_callback_in_hyperparameters_comes_back(tmp_path):
    class WithCallback(LitEncoder):
        def __init__(self, callback=None):
            super().__init__()
            self.save_hyperparameters()
            self.callback = callback

    callback, files = AdapterCallback(3, "block"), checkpoints(tmp_path)
    trainer(callback, files, max_epochs=1, limit_train_batches=1).fit(WithCallback(callback), data(), data(1))
    loaded = load_from_checkpoint(WithCallback, files.last_model_path)
    assert loaded.callback.config == callback.config
