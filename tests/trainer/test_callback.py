"""The callback over whole runs: injection, freezing, what stays afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    unmerge_lora,
)
from tests.helpers.models import BuiltInConfigureModel, BuiltInSetup, Lit, checkpoints, data, net, trainer
from tests.helpers.runs import Break, Spy, types

ATTN = [f"net.layers.{block}.{map_}" for block in (0, 1) for map_ in "qkvo"]


def attributes(module: nn.Module) -> dict[str, set[str]]:
    """The instance attributes of every module, but the merge record's and what Lightning itself sets in a run."""
    return {n: set(m.__dict__) - {"_lightning_lora", "_device", "_trainer"} for n, m in module.named_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Lit, BuiltInSetup, BuiltInConfigureModel])
def test_adapts_wherever_the_model_is_built(cls, tmp_path):
    spy, module = Spy(), cls()
    trainer(LoRACallback(r=4), spy).fit(module, data(), data(1))
    assert spy.trainable == [f"{name}.lora.default.{matrix}" for name in ATTN for matrix in "AB"]
    assert spy.in_groups == spy.wanted
    for name, parameter in net().named_parameters():
        assert torch.equal(spy.base[f"net.{name}"], parameter), name


def test_merged_weights_are_w_plus_scale_b_a():
    spy, module = Spy(), Lit()
    trainer(LoRACallback(r=4, alpha=8), spy).fit(module, data())
    for name in ATTN:
        A, B = spy.adapters[f"{name}.lora.default.A"], spy.adapters[f"{name}.lora.default.B"]
        expected = spy.base[f"{name}.weight"].double() + 2.0 * B.double() @ A.double()
        assert B.abs().max() > 1e-3
        torch.testing.assert_close(module.get_submodule(name).weight.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module.eval()(data(9).dataset.tensors[0]), spy.output, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_after_fit_the_module_is_the_plain_one():
    module, plain = Lit(), Lit()
    keys, before, kinds = list(module.state_dict()), attributes(module), types(module)
    module.net.head.weight.requires_grad_(False)
    runner = trainer(LoRACallback(r=4))
    strategy = set(runner.strategy.__dict__)
    runner.fit(module, data(), data(1))
    assert list(module.state_dict()) == keys
    assert types(module) == kinds
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert flags == {name: name != "net.head.weight" for name, _ in plain.named_parameters()}
    trainer().fit(plain, data(), data(1))
    assert attributes(module) == attributes(plain) and attributes(module).keys() == before.keys()
    assert not {"teardown", "save_checkpoint", "load_checkpoint", "lightning_module_state_dict"} & (
        set(runner.strategy.__dict__) - strategy
    )
    assert len(module._load_state_dict_post_hooks) == 0


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_exception_or_ctrl_c_leaves_no_wrap_and_a_new_fit_works(error):
    module, plain = Lit(), Lit()
    runner = trainer(LoRACallback(r=4), Break(error))
    with pytest.raises((ValueError, SystemExit)):
        runner.fit(module, data(), data(1))
    assert not {"setup", "configure_optimizers", "configure_model"} & set(module.__dict__)
    assert not {"teardown", "save_checkpoint", "load_checkpoint"} & set(runner.strategy.__dict__)
    hooks = [type(hook).__name__ for hook in module._load_state_dict_post_hooks.values()]
    assert hooks == ["BaseCheckpoint"], "of an adapted module, not of the run"
    assert all(p.requires_grad for _, p in module.named_parameters())
    trained = {name: p.detach().clone() for name, p in lora_parameters(module)}
    assert len(trained) == 16 and any(p.abs().max() > 0 for n, p in trained.items() if n.endswith("B"))
    for name, parameter in plain.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter), "not merged, base untouched"
    trainer(LoRACallback(r=4)).fit(module, data(), data(1))
    assert list(module.state_dict()) == list(plain.state_dict())
    assert len(module._load_state_dict_post_hooks) == 0


def test_an_error_before_the_first_step_leaves_the_module_as_found():
    module, kinds = Lit(), types(Lit())
    with pytest.raises(ValueError, match="`targets` has 'quary', which matches no module"):
        trainer(LoRACallback(r=4, targets=["q", "quary"])).fit(module, data())
    assert types(module) == kinds
    assert "_lightning_lora" not in {key for inner in module.modules() for key in inner.__dict__}
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_changes_nothing_and_equals_the_base(stage):
    module, kinds = Lit(), types(Lit())
    result = getattr(trainer(LoRACallback(r=4)), stage)(module, data(2))
    expected = getattr(trainer(), stage)(Lit(), data(2))
    assert str(result) == str(expected)
    assert types(module) == kinds
    assert "_lightning_lora" not in {key for inner in module.modules() for key in inner.__dict__}


@pytest.mark.slow
def test_validate_fit_test_fit_injects_once():
    module, runner = Lit(), trainer(LoRACallback(r=4, merge=False))
    runner.validate(module, data(1), verbose=False)
    runner.fit(module, data(), data(1))
    first = dict(lora_parameters(module))
    runner.test(module, data(2), verbose=False)
    runner.fit_loop.max_epochs = 3
    runner.fit(module, data(), data(1))
    assert [(name, id(p)) for name, p in lora_parameters(module)] == [(name, id(p)) for name, p in first.items()]


@pytest.mark.slow
def test_second_fit_continues_on_the_original_base():
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.parameters = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    module, start, spy = Lit(), Start(), Spy()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    learned = {name: value.clone() for name, value in lora_state_dict(module).items()}
    trainer(LoRACallback(r=4), start, spy, max_epochs=1).fit(module, data())
    base = {f"net.{name}": parameter for name, parameter in net().named_parameters()}
    assert len(learned) == 16
    for name, value in (learned | base).items():
        assert torch.equal(start.parameters[name], value), name
    for name, value in base.items():
        assert torch.equal(spy.base[name], value), name


def test_other_arguments_on_a_merged_module_are_an_error_and_it_stays_merged():
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    merged = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"already has adapters \(merged\).*`r=8` instead of `r=4`.*remove_lora"):
        trainer(LoRACallback(r=8), max_epochs=1).fit(module, data())
    for name, value in module.state_dict().items():
        assert torch.equal(value, merged[name])


def test_an_error_before_the_first_step_leaves_a_merged_module_merged():
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    merged = {name: value.clone() for name, value in module.state_dict().items()}

    class Refuse(Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trainer(LoRACallback(r=4), Refuse()).fit(module, data())
    assert list(module.state_dict()) == list(merged)
    assert all(torch.equal(value, merged[name]) for name, value in module.state_dict().items())


def test_apply_lora_before_the_callback_is_continued():
    module = Lit()
    apply_lora(module, LoRAConfig(r=4))
    A = dict(lora_parameters(module))["net.layers.0.q.lora.default.A"]
    trainer(LoRACallback(r=4, merge=False), max_epochs=1).fit(module, data())
    assert dict(lora_parameters(module))["net.layers.0.q.lora.default.A"] is A


class CopyDuringFit(Callback):
    """Pickles and copies the module in the middle of a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
            self.expected = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Lit, BuiltInSetup, BuiltInConfigureModel])
def test_the_module_is_copied_and_pickled_during_fit_without_the_run(cls):
    spy, module = CopyDuringFit(), cls()
    trainer(LoRACallback(r=4), spy).fit(module, data())
    for twin in spy.copies:
        assert {n: p.tolist() for n, p in twin.named_parameters()} == {n: p.tolist() for n, p in spy.expected.items()}
        assert not hasattr(twin.setup, "replacement") and not hasattr(twin.configure_optimizers, "replacement")
        merge_lora(twin)
        assert list(twin.state_dict()) == list(module.state_dict())


@pytest.mark.slow
def test_head_in_also_train_is_trained_saved_and_frozen_otherwise(tmp_path):
    spy, module, files = Spy(), Lit(), checkpoints(tmp_path)
    trainer(LoRACallback(r=2, targets="qv", also_train=["head"]), spy, files).fit(module, data(), data(1))
    head = {"net.head.weight", "net.head.bias"}
    assert {name for name in spy.trainable if ".lora." not in name} == head
    changed = {n for n, p in net().named_parameters() if not torch.equal(spy.base[f"net.{n}"], p)}
    assert {f"net.{name}" for name in changed} == head
    saved = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    assert {name for name in saved if ".lora." not in name} == head


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {f"{n}.bias" for n in ATTN}),
        ("all", {n for n, _ in Lit().named_parameters() if n.endswith("bias")}),
    ],
)
def test_bias(bias, expected):
    spy = Spy()
    trainer(LoRACallback(r=2, bias=bias), spy, max_epochs=1).fit(Lit(), data())
    assert {name for name in spy.trainable if ".lora." not in name} == expected


def test_merge_false_keeps_live_adapters_and_the_base():
    module = Lit()
    trainer(LoRACallback(r=4, merge=False)).fit(module, data())
    assert len(dict(lora_parameters(module))) == 16
    for name, parameter in net().named_parameters():
        assert torch.equal(module.net.get_parameter(name), parameter)
        assert module.net.get_parameter(name).requires_grad


@pytest.mark.slow
def test_seed_everything_seeds_the_adapters_and_no_seed_is_the_same_everywhere(monkeypatch):
    def start(seed=None, **kwargs):
        module = Lit()
        trainer(LoRACallback(r=4, merge=False, **kwargs), max_steps=0).fit(module, data())
        apply_lora(module, LoRAConfig(r=4, **kwargs))
        return dict(lora_parameters(module))["net.layers.0.q.lora.default.A"].detach()

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(1)
    one = start()
    torch.manual_seed(2)
    assert torch.equal(one, start()) and torch.equal(one, start(seed=0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.equal(one, start())


def test_the_global_random_stream_is_untouched():
    class Draw(Callback):
        def on_train_start(self, trainer, pl_module):
            self.drawn = torch.rand(4)

    drawn = []
    for callbacks in ([Draw()], [LoRACallback(r=4), Draw()]):
        torch.manual_seed(3)
        trainer(*callbacks, max_epochs=1).fit(Lit(), data())
        drawn.append(callbacks[-1].drawn)
    assert torch.equal(*drawn)


def test_unmerge_after_fit_gives_the_base_back_bit_for_bit():
    module = Lit()
    trainer(LoRACallback(r=4)).fit(module, data())
    unmerge_lora(module)
    for name, parameter in net().named_parameters():
        assert torch.equal(module.net.get_parameter(name).view(torch.int32), parameter.view(torch.int32)), name
