"""`save="merged"`: files that any loader takes, from which a run of this package goes on exactly as from adapters."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from torch import nn

from lightning_lora import (
    LoRACallback,
    load_from_checkpoint,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    remove_lora,
    unmerge_lora,
)
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.runs import Break, load, same, types
from tests.helpers.scripts import run_code
from tests.helpers.selection import slow_except


def make() -> Lit:
    return Lit(batch_norm=True, dropout=0.2)


def lora(**kwargs: object) -> LoRACallback:
    return LoRACallback(**{"r": 4, "also_train": ["head"], "dropout": 0.1, "save": "merged", **kwargs})


def fit(folder, epochs=2, ckpt=None, *more, module=None, **kwargs):
    module, files = module or make(), checkpoints(folder)
    torch.manual_seed(1 if ckpt is None else 99)
    runner = trainer(lora(**kwargs), *more, files, max_epochs=epochs)
    runner.fit(module, data(shuffle=True), data(1), ckpt_path=ckpt)
    return module, runner, files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fitted and merged module, its Trainer and its files, of which the best is not the last."""
    module, runner, files = fit(tmp_path_factory.mktemp("run"), 4, module=Lit(batch_norm=True, lr=0.3))
    best, last = load(files.best_model_path), load(files.last_model_path)
    assert best["epoch"] != last["epoch"]
    return module, runner, files


def expected(path) -> dict:
    """What a merge writes, from the adapters in the file."""
    recorded = load(path)
    recorded["state_dict"] = recorded["lightning_lora"].pop("state_dict")
    torch.save(recorded, other := f"{path}.adapter")
    return dict(load_from_checkpoint(Lit, other, merge=True).state_dict())


def test_every_kind_of_save_holds_what_a_merge_writes(tmp_path):
    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            before = {key: value.clone() for key, value in pl_module.state_dict().items()}
            trainer.save_checkpoint(tmp_path / "full.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
            assert same(dict(pl_module.state_dict()), before)

    failing = OnExceptionCheckpoint(tmp_path, filename="exception")
    best = ModelCheckpoint(tmp_path, filename="best", save_weights_only=True)
    with pytest.raises(ValueError, match="broken"):
        trainer(lora(), Saves(), failing, Break(ValueError("broken"), 12), best).fit(make(), data())
    plain = make()
    for name in ("full", "weights", "exception", "best"):
        state = load(tmp_path / f"{name}.ckpt")["state_dict"]
        assert list(state) == list(plain.state_dict())
        assert same(dict(state), expected(tmp_path / f"{name}.ckpt")), name
        assert not torch.equal(state["net.layers.0.q.weight"], plain.net.layers[0].q.weight)
        assert torch.equal(state["net.layers.0.mlp.weight"], plain.net.layers[0].mlp.weight)


@pytest.mark.slow
def test_plain_lightning_loads_the_best_file_where_the_package_is_not_installed(run, tmp_path):
    path = run[2].best_model_path
    merged = load_from_checkpoint(Lit, path, merge=True).eval()
    torch.save(merged(data(3).dataset.tensors[0]), tmp_path / "output.pt")
    script = """
import sys
sys.modules["lightning_lora"] = None  # an import of it raises
import torch
from tests.helpers.models import Lit, data, trainer
module = Lit.load_from_checkpoint(sys.argv[1]).eval()
assert torch.equal(module(data(3).dataset.tensors[0]), torch.load(sys.argv[2]))
plain = Lit(batch_norm=True)
plain.load_state_dict(torch.load(sys.argv[1], weights_only=True)["state_dict"])
trainer().test(Lit(batch_norm=True), data(2), ckpt_path=sys.argv[1], verbose=False)
"""
    done = run_code(script, path, tmp_path / "output.pt")
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_equals_the_uninterrupted_one_and_that_of_adapter_files(tmp_path):
    fit(tmp_path / "two", 2)
    fit(tmp_path / "one", 1)
    fit(tmp_path / "resumed", 2, tmp_path / "one" / "last.ckpt")
    fit(tmp_path / "adapter", 2, save="adapter")
    two, resumed, adapter = (load(tmp_path / name / "last.ckpt") for name in ("two", "resumed", "adapter"))
    assert same(dict(two["state_dict"]), dict(resumed["state_dict"]))
    two, resumed = two["lightning_lora"], resumed["lightning_lora"]
    assert same(two["state_dict"], adapter["state_dict"])
    assert two["lr_schedulers"] == resumed["lr_schedulers"] == adapter["lr_schedulers"]
    for index, state in two["optimizer_states"][0]["state"].items():
        assert same(state, resumed["optimizer_states"][0]["state"][index])
    fit(tmp_path / "across", 2, tmp_path / "one" / "last.ckpt", save="adapter")
    assert same(load(tmp_path / "across" / "last.ckpt")["state_dict"], adapter["state_dict"])


def test_a_run_without_the_callback_finds_the_model_alone(run):
    """The states of its optimizers would be those of adapters: Lightning's own words say that there are none."""
    path = run[2].last_model_path
    with pytest.raises(KeyError, match="Trying to restore optimizer state but checkpoint contains only the model"):
        trainer(max_epochs=5).fit(Lit(batch_norm=True), data(), data(1), ckpt_path=path)
    trainer().test(Lit(batch_norm=True), data(2), ckpt_path=path, verbose=False)
    plain = Lit(batch_norm=True)
    plain.load_state_dict(load(path)["state_dict"])
    trainer(max_epochs=1).fit(plain, data())


@pytest.mark.parametrize("merge", slow_except(["best"], [True, "best", False]))
def test_the_end_of_fit_and_test_are_those_of_adapter_files(tmp_path, merge):
    results = []
    for save in ("merged", "adapter"):
        module = Lit(batch_norm=True, lr=0.3)
        module, runner, files = fit(tmp_path / save, 3, module=module, merge=merge, save=save)
        best = files.best_model_path
        after = {key: value.clone() for key, value in module.state_dict().items()}
        first = runner.test(module, data(2), ckpt_path="best", verbose=False)
        assert merge is False or same(dict(module.state_dict()), after)
        results.append((after, first, trainer(lora(save=save)).test(make(), data(2), ckpt_path=best, verbose=False)))
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("read", [lambda state: state, lambda state: copy.deepcopy(state)])
def test_the_fitted_module_adopts_the_adapters_of_any_file_of_the_run(run, live, read):
    module = copy.deepcopy(run[0])
    if live:
        unmerge_lora(module)
    kinds = types(module)
    for path in (run[2].best_model_path, run[2].last_model_path, run[2].best_model_path):
        state = read(load(path)["state_dict"])
        result = module.load_state_dict(state)
        assert result.missing_keys == result.unexpected_keys == [] and types(module) == kinds
        assert same(dict(merged_state_dict(module)), dict(state))
        assert same(lora_state_dict(module), load(path)["lightning_lora"]["state_dict"])
    remove_lora(module)
    plain = Lit(batch_norm=True).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in module.state_dict().items() if "bn" not in key)


@pytest.mark.parametrize("live", [False, True])
def test_a_copy_without_the_mark_is_not_added_twice(run, live):
    module = copy.deepcopy(run[0])
    state = dict(load(run[2].last_model_path)["state_dict"])
    if live:
        unmerge_lora(module)
    module.load_state_dict(state)
    assert same(dict(merged_state_dict(module)), state)


def test_other_merged_values_without_the_mark_are_a_base_with_a_warning(run):
    module, state = copy.deepcopy(run[0]), dict(load(run[2].best_model_path)["state_dict"])
    unmerge_lora(module)
    with pytest.warns(
        UserWarning, match=r"differs from the base in adapted weights only \(as in `net.layers.0.q.weight`"
    ):
        module.load_state_dict(state)
    assert torch.equal(module.net.layers[0].q.weight, state["net.layers.0.q.weight"])


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", ["net.layers.1.mlp.weight", "net.layers.1.o.weight"])
def test_a_file_of_another_base_is_refused_and_nothing_is_changed(run, live, name):
    module, state = copy.deepcopy(run[0]), load(run[2].best_model_path)["state_dict"]
    if live:
        unmerge_lora(module)
    before, adapters = {k: v.clone() for k, v in module.state_dict().items()}, lora_state_dict(module)
    adapters = {key: value.clone() for key, value in adapters.items()}
    state[name] = state[name] + 0.5
    with pytest.raises(ValueError, match=rf"`{name}` has other values in the state dict than in this module"):
        module.load_state_dict(state)
    assert same(dict(module.state_dict()), before) and same(lora_state_dict(module), adapters)


def test_hooks_that_rename_and_remove_have_their_way(tmp_path):
    class Hooks(Lit):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.layers.0.mlp.weight"]
            checkpoint["state_dict"] = {f"my.{key}": value for key, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k.removeprefix("my."): v for k, v in checkpoint["state_dict"].items()}
            checkpoint["state_dict"].setdefault("net.layers.0.mlp.weight", Lit().net.layers[0].mlp.weight.detach())

    module, _, _ = fit(tmp_path / "a", 2, module=Hooks(batch_norm=True), merge=False)
    state = load(tmp_path / "a" / "last.ckpt")["state_dict"]
    assert set(state) == {f"my.{key}" for key in Lit(batch_norm=True).state_dict()} - {"my.net.layers.0.mlp.weight"}
    fit(tmp_path / "b", 3, tmp_path / "a" / "last.ckpt", module=Hooks(batch_norm=True))
    merge_lora(module)
    plain = Hooks.load_from_checkpoint(tmp_path / "a" / "last.ckpt", batch_norm=True)
    assert same(dict(plain.state_dict()), dict(module.state_dict()))


def test_an_average_is_what_is_merged_in_the_file(tmp_path):
    module, _, _ = fit(tmp_path, 2, None, EMAWeightAveraging(decay=0.9))
    recorded = load(tmp_path / "last.ckpt")
    assert same(dict(recorded["state_dict"]), expected(tmp_path / "last.ckpt"))
    assert same(dict(recorded["state_dict"]), dict(module.state_dict()))
    assert not same(recorded["current_model_state"], recorded["lightning_lora"]["state_dict"])


def test_what_cannot_hold_the_sum_is_refused_before_the_first_step(monkeypatch):
    class Renames(Lit):
        def state_dict(self, *args, **kwargs):
            return self.net.state_dict()

    with pytest.raises(
        MisconfigurationException, match=r"`Renames.state_dict\(\)` has no entry `net.layers.0.q.weight`"
    ):
        trainer(lora()).fit(Renames(), data())
    with pytest.raises(ValueError, match=r"`save='merged'` writes sums.*`base_dtype='bf16'`"):
        lora(base_dtype="bf16")
    with pytest.raises(ValueError, match=r"`save` must be one of 'adapter', 'merged'"):
        lora(save="full")
    monkeypatch.setattr("lightning_lora.methods.lora.quantized_layers", lambda model: ["net.layers.0.q"])
    with pytest.raises(MisconfigurationException, match=r"`save='merged'` cannot write its files. Quantized weights"):
        trainer(lora()).fit(Lit(), data())


class Tied(Lit):
    """Two layers with one weight, as one object or as one memory."""

    def __init__(self, by_memory: bool = False) -> None:
        super().__init__()
        first, second = (block.q for block in self.net.layers)
        second.weight = nn.Parameter(first.weight.detach()) if by_memory else first.weight


@pytest.mark.parametrize("by_memory", [False, True])
@pytest.mark.parametrize("adapted", [["layers.0.q"], ["layers.1.q"], ["layers.0.q", "layers.1.q"]])
def test_a_tied_weight_that_is_adapted_is_refused_before_the_first_step(by_memory, adapted):
    names, module = [f"net.{name}" for name in adapted], Tied(by_memory)
    plain = types(module)
    words = rf"`save='merged'` cannot write its files. `{names[0]}.weight` is adapted and tied .*exclude="
    with pytest.raises(MisconfigurationException, match=words + re.escape(str(names))):
        trainer(lora(targets=adapted)).fit(module, data())
    assert types(module) == plain


def test_tied_weights_without_adapters_load_as_they_are(tmp_path):
    module, _, files = fit(tmp_path, module=Tied(), targets=["k"])
    plain = Tied()
    plain.load_state_dict(load(files.last_model_path)["state_dict"])
    assert same(dict(plain.state_dict()), dict(module.state_dict()))


def test_sharded_strategies_are_refused_before_the_first_step():
    runner = trainer(lora())
    runner.strategy.__class__ = type("FSDPStrategy", (type(runner.strategy),), {})
    with pytest.raises(MisconfigurationException, match=r"`save='merged'` needs the whole model in every save"):
        runner.fit(Lit(), data())
