"""PrefixCallback in a Trainer; the life of its run is among the cases of `tests/methods/test_life_of_a_run.py`."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_lora import PrefixCallback, load_from_checkpoint, remove_adapted
from tests.helpers.models import Attention, LitEncoder, checkpoints, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))


def test_arguments_are_those_of_the_configuration():
    callback = PrefixCallback(3, ["layers.1"], exclude=["head"], bias="all", seed=4, lr_scale=10.0)
    config = callback.config
    assert (config.length, config.targets, config.exclude) == (3, ["layers.1"], ["head"])
    assert (config.bias, config.seed, callback.run_config.lr_scale) == ("all", 4, 10.0)


def test_the_module_keeps_its_prefixes_and_the_end_of_fit_says_so(tmp_path, log):
    module, files = LitEncoder(), checkpoints(tmp_path)
    trainer(PrefixCallback(3, also_train=["head"]), files).fit(module, data(), data(1))
    assert "net.layers.*.attn  2 modules  SelfAttention  192 parameters" in "\n".join(log)
    assert "A prefix cannot be merged into the weights: the module keeps it." in "\n".join(log)
    trained = module.eval()(X)
    assert torch.equal(load_from_checkpoint(LitEncoder, files.last_model_path).eval()(X), trained)
    remove_adapted(module)
    assert torch.equal(module.eval()(X), LitEncoder().eval()(X))


class Eager(LitEncoder):
    """Attention of the second block is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.net.layers[1].attn = Attention(16)


def test_what_computes_otherwise_is_refused_before_the_first_step():
    module = Eager()
    before = [type(each) for each in module.modules()]
    with pytest.raises(ValueError, match=r"`net\.layers\.1\.attn` computes attention without .*exclude="):
        trainer(PrefixCallback(3)).fit(module, data())
    assert [type(each) for each in module.modules()] == before
    trainer(PrefixCallback(3, exclude=["net.layers.1.attn"]), max_epochs=1).fit(module, data())


def test_a_kernel_that_is_switched_off_later_is_refused_in_the_first_step():
    class Late(LitEncoder):
        def on_train_start(self) -> None:
            self.net.layers[0].attn.forward_by_hand = True

    module = Late()
    attention = type(module.net.layers[0].attn)

    class Switched(attention):
        forward_by_hand = False

        def forward(self, x):
            return self.o_proj(x) if self.forward_by_hand else super().forward(x)

    module.net.layers[0].attn.__class__ = Switched
    with pytest.raises(RuntimeError, match=r"`net\.layers\.0\.attn` computed its output without"):
        trainer(PrefixCallback(3)).fit(module, data())


def test_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    arguments = ["--trainer.callbacks+=PrefixCallback", "--trainer.callbacks.length=5", "--trainer.logger=false"]
    arguments += ["--trainer.callbacks.targets=[layers.0]"]
    cli = LightningCLI(LitEncoder, args=arguments, run=False, save_config_callback=None)
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, PrefixCallback)]
    assert (callback.config.length, callback.config.targets) == (5, ["layers.0"])


def test_multihead_attention_of_torch_in_a_run():
    class Torch(LitEncoder):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
            self.net.layers = nn.ModuleList([nn.TransformerEncoder(layer, 2)])

    module = Torch()
    callback = PrefixCallback(3)
    trainer(callback, max_epochs=1).fit(module, data(), data(1))
    names = [name for name, _ in callback.method.added_parameters(module)]
    assert names == [f"net.layers.0.layers.{n}.self_attn.prefix.{key}" for n in (0, 1) for key in "KV"]
