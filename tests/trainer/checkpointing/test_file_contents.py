"""Modules in hyperparameters or in what callbacks keep bring the base into a file: one warning names them."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora import LoRACallback
from lightning_lora.trainer.checkpointing.file_contents import holds_modules
from tests.helpers.models import Lit, checkpoints, data, net, trainer


class TakesNet(Lit):
    def __init__(self, net, ignore=()):
        super().__init__()
        self.save_hyperparameters(ignore=list(ignore), logger=False)
        self.net = net


class Keeps(Callback):
    """Keeps something of the module in its state."""

    def __init__(self, what):
        self.what, self.kept = what, None

    def on_train_start(self, trainer, pl_module):
        self.kept = self.what(pl_module)

    def state_dict(self):
        return {"kept": self.kept}


class Holder:
    def __init__(self, module):
        self.deep = [{"module": module}]


def fit(folder, module, *callbacks):
    files = checkpoints(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LoRACallback(r=4), *callbacks, files, max_epochs=2).fit(module, data(), data(1))
    return [str(each.message) for each in caught if "Files of this run are not small" in str(each.message)], files


@pytest.mark.parametrize(
    ("what", "is_named"),
    [
        (lambda module: copy.deepcopy(module.net.layers[0]), True),
        (lambda module: [module.net.layers[0].mlp.weight.detach().view(-1)], True),
        (lambda module: Holder(module.net.head), True),
        (lambda module: module.net.layers[0].q.lora.default.B.detach(), False),
        (lambda module: {"numbers": np.ones(3), "loss": torch.nn.MSELoss(), "text": "net"}, False),
    ],
)
def test_what_a_callback_keeps_is_named_once_if_it_brings_the_base(tmp_path, what, is_named):
    told, _ = fit(tmp_path, Lit(), Keeps(what))
    assert len(told) == is_named
    assert all("`callbacks['Keeps']` of the checkpoint holds modules or frozen weights" in each for each in told)


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance")
def test_a_module_in_the_hyperparameters_is_named_and_the_remedy_works(tmp_path):
    told, files = fit(tmp_path / "a", TakesNet(net()))
    assert len(told) == 1 and "`hyper_parameters['net']` of the checkpoint holds" in told[0]
    assert "`save_hyperparameters(ignore=[...])`" in told[0]
    told, files = fit(tmp_path / "b", TakesNet(net(), ignore=["net"]))
    assert told == []
    assert torch.load(files.last_model_path, weights_only=True)["hyper_parameters"].keys() == {"ignore", "lr"}


def test_what_cannot_be_pickled_is_left_to_the_writer():
    assert not holds_modules([lambda: None], set())
    assert holds_modules([net(), lambda: None], set())
