"""The checkpoint hooks of users see the whole module on one device and under DDP; files hold adapters alone."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_lora import LoRACallback, unmerge_lora
from lightning_lora.trainer.checkpointing import checkpoint_io, contents
from tests.helpers.models import Lit, data, net, trainer
from tests.helpers.models import checkpoints as files_in
from tests.helpers.runs import ADAPTERS, BASE, load, same
from tests.helpers.selection import slow_except

MLP = "net.layers.0.mlp.weight"


class FillsIn(Lit):
    """As projects that renamed their modules once, or that load older files."""

    def on_load_checkpoint(self, checkpoint):
        for key, value in self.state_dict().items():
            checkpoint["state_dict"].setdefault(key, value)


class Pops(Lit):
    """As projects that keep a frozen network out of their files."""

    def on_save_checkpoint(self, checkpoint):
        self.popped = checkpoint["state_dict"].pop(MLP)

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"].pop(MLP)
        checkpoint["state_dict"][MLP] = torch.zeros(16, 16)


class Reads(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["norm"] = float(checkpoint["state_dict"][MLP].norm())

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["norm"] == float(checkpoint["state_dict"][MLP].norm())


class Compares(Lit):
    """As a widespread snippet that leaves out what has another shape."""

    def on_load_checkpoint(self, checkpoint):
        own = self.state_dict()
        checkpoint["state_dict"] = {
            key: value if value.shape == own[key].shape else own[key] for key, value in checkpoint["state_dict"].items()
        }
        assert checkpoint["state_dict"].keys() == own.keys()


class Sees(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved = dict(checkpoint["state_dict"])
        self.own = dict(pl_module.state_dict())

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.loaded = dict(checkpoint["state_dict"])


def fit(path, cls, epochs, ckpt=None, *more, **kwargs):
    module, files = cls(batch_norm=True), files_in(path)
    torch.manual_seed(1)
    runner = trainer(LoRACallback(r=4, merge="best"), *more, files, max_epochs=epochs, **kwargs)
    runner.fit(module, data(shuffle=True), data(1), ckpt_path=ckpt)
    runner.test(module, data(2), ckpt_path="best", verbose=False)
    return module, load(path / "last.ckpt")


@pytest.mark.parametrize("cls", slow_except([FillsIn, Pops], [FillsIn, Pops, Reads, Compares]))
def test_a_hook_over_the_base_changes_neither_the_file_nor_the_run(tmp_path, cls):
    _, plain = fit(tmp_path / "plain", Lit, 2)
    module, _ = fit(tmp_path / "hooks", cls, 1)
    module, resumed = fit(tmp_path / "again", cls, 2, tmp_path / "hooks" / "last.ckpt")
    assert same(resumed["state_dict"], plain["state_dict"])
    assert not set(resumed["state_dict"]) & BASE
    unmerge_lora(module)
    assert all(torch.equal(module.net.get_parameter(name), p) for name, p in net().named_parameters() if "bn" in name)


@pytest.fixture
def no_process_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", slow_except(["auto"], ["auto", "ddp"]))
@pytest.mark.usefixtures("no_process_group_left")
def test_hooks_see_the_module_s_own_memory_and_the_file_has_adapters_alone(tmp_path, strategy):
    sees = Sees()
    _, saved = fit(tmp_path / "a", Lit, 1, None, sees, strategy=strategy)
    fit(tmp_path / "b", Lit, 2, tmp_path / "a" / "last.ckpt", sees, strategy=strategy)
    assert sees.saved.keys() == sees.own.keys() == sees.loaded.keys() > BASE | ADAPTERS
    assert all(sees.saved[key].data_ptr() == value.data_ptr() for key, value in sees.own.items() if value.numel() > 1)
    assert {key for key in saved["state_dict"] if "bn" not in key} == ADAPTERS


def test_an_average_is_resumed_as_ever(tmp_path):
    def averaging():
        return EMAWeightAveraging(decay=0.9)

    _, two = fit(tmp_path / "a", FillsIn, 2, None, averaging())
    fit(tmp_path / "b", FillsIn, 1, None, averaging())
    _, resumed = fit(tmp_path / "c", FillsIn, 2, tmp_path / "b" / "last.ckpt", averaging())
    for key in ("state_dict", "current_model_state"):
        assert same(two[key], resumed[key]) and not set(two[key]) & BASE


def test_a_hook_that_removes_an_adapter_is_named(tmp_path):
    class Removes(Lit):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.layers.1.o.lora.default.B"]

    with pytest.raises(ValueError, match=r"lacks `net\.layers\.1\.o\.lora\.default\.B`: an `on_save_checkpoint` of"):
        fit(tmp_path, Removes, 1)


def test_a_save_filters_once(tmp_path, monkeypatch):
    calls, original = [], contents.without_base
    monkeypatch.setattr(checkpoint_io.contents, "without_base", lambda *args: calls.append(1) or original(*args))

    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "full.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    trainer(LoRACallback(r=4), Saves(), max_epochs=1).fit(Lit(), data())
    assert len(calls) == 2
    assert set(load(tmp_path / "full.ckpt")["state_dict"]) == ADAPTERS
