"""PromptCallback in a Trainer; the life of its run is among the cases of `tests/methods/test_life_of_a_run.py`."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_lora import PromptCallback, load_from_checkpoint, remove_adapted
from tests.helpers.models import EncoderBlock, LitEncoder, checkpoints, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))


def test_arguments_are_those_of_the_configuration():
    callback = PromptCallback(3, True, exclude=["head"], bias="all", seed=4, lr_scale=10.0)
    config = callback.config
    assert (config.length, config.deep, config.exclude) == (3, True, ["head"])
    assert (config.bias, config.seed, callback.run_config.lr_scale) == ("all", 4, 10.0)


def test_the_module_keeps_its_prompt_and_the_end_of_fit_says_so(tmp_path, log):
    module, files = LitEncoder(), checkpoints(tmp_path)
    trainer(PromptCallback(3, also_train=["head"]), files).fit(module, data(), data(1))
    assert "net.layers.*  1 module  EncoderBlock  48 parameters" in "\n".join(log)
    assert "A prompt cannot be merged into the weights: the module keeps it." in "\n".join(log)
    trained = module.eval()(X)
    assert torch.equal(load_from_checkpoint(LitEncoder, files.last_model_path).eval()(X), trained)
    remove_adapted(module)
    assert torch.equal(module.eval()(X), LitEncoder().eval()(X))


class Windows(EncoderBlock):
    """It needs four tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(len(x), 4, 16))


class LitWindows(LitEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers[1] = Windows()


def test_a_block_that_needs_the_length_is_named_before_the_first_step():
    module = LitWindows()
    before = module.net.head.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"`net\.layers\.1` fails with a prompt before its tokens"):
        trainer(PromptCallback(3)).fit(module, data())
    assert torch.equal(module.net.head.weight, before)
    trainer(PromptCallback(3, exclude=["net.layers.1"]), max_epochs=1).fit(LitWindows(), data())


def test_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    arguments = ["--trainer.callbacks+=PromptCallback", "--trainer.callbacks.length=5", "--trainer.logger=false"]
    arguments += ["--trainer.callbacks.deep=true"]
    cli = LightningCLI(LitEncoder, args=arguments, run=False, save_config_callback=None)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, PromptCallback)]
    assert (callback.config.length, callback.config.deep) == (5, True)
