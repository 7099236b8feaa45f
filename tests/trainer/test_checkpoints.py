"""Files of a run: what is in them, what resumes from them, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from lightning_lora import (
    LoRACallback,
    load_from_checkpoint,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.helpers.models import BuiltInConfigureModel, Lit, checkpoints, data, net, trainer
from tests.helpers.runs import ADAPTERS, BASE, Break, Spy, load, same
from tests.helpers.selection import slow_except


def tensor_names(thing: object, name: str = "") -> set[str]:
    """The keys of every tensor anywhere in a checkpoint."""
    if isinstance(thing, torch.Tensor):
        return {name}
    items = thing.items() if isinstance(thing, dict) else []
    return {found for key, value in items for found in tensor_names(value, str(key))}


def fit(path: Path, epochs: int = 2, ckpt: object = None, cls=Lit, *more: object, **kwargs: object) -> dict:
    """Train and give back the last file."""
    files = checkpoints(path)
    arguments = {"r": 4, "merge": False, **kwargs}
    module = cls()
    torch.manual_seed(1 if ckpt is None else 99)
    runner = trainer(LoRACallback(**arguments), *more, files, max_epochs=epochs)
    runner.fit(module, data(shuffle=True), data(1), ckpt_path=ckpt)
    return load(files.last_model_path)


class SaveBoth(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "full.ckpt")
        trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)


def test_every_save_path_writes_adapters_alone(tmp_path):
    best = ModelCheckpoint(tmp_path / "weights_only", save_weights_only=True)
    failing = OnExceptionCheckpoint(tmp_path, filename="exception")
    with pytest.raises(ValueError, match="broken"):
        trainer(LoRACallback(r=4), SaveBoth(tmp_path), failing, Break(ValueError("broken"), 12), best).fit(
            Lit(), data()
        )
    files = [*tmp_path.glob("*.ckpt"), *tmp_path.glob("weights_only/*.ckpt")]
    assert {file.name for file in files} >= {"full.ckpt", "weights.ckpt", "exception.ckpt"} and len(files) == 4
    for file in files:
        checkpoint = load(file)
        assert set(checkpoint["state_dict"]) == ADAPTERS, file
        assert not tensor_names(checkpoint) & BASE, file


@pytest.mark.parametrize("cls", slow_except([Lit], [Lit, BuiltInConfigureModel]))
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, cls):
    make = (lambda: Lit(dropout=0.2, batch_norm=True)) if cls is Lit else cls
    four = fit(tmp_path / "a", 4, None, make, dropout=0.1)
    two = fit(tmp_path / "b", 2, None, make, dropout=0.1)
    resumed = fit(tmp_path / "c", 4, tmp_path / "b" / "last.ckpt", make, dropout=0.1)
    assert not same(two["state_dict"], four["state_dict"])
    assert same(resumed["state_dict"], four["state_dict"])
    assert resumed["global_step"] == four["global_step"] == 32
    assert resumed["lr_schedulers"] == four["lr_schedulers"]
    for index, state in four["optimizer_states"][0]["state"].items():
        assert same(state, resumed["optimizer_states"][0]["state"][index])


def test_on_save_checkpoint_filters_any_state_dict_of_the_module_and_only_once(tmp_path):
    callback, module = LoRACallback(r=4, also_train=["head"], merge=False), Lit(batch_norm=True)
    trainer(callback, max_epochs=1).fit(module, data())
    trained = {"net.head.weight", "net.head.bias", *ADAPTERS}
    moved = {f"net.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    checkpoint = {"state_dict": module.state_dict(), "epoch": 3, "hyper_parameters": {"lr": 1.0}}
    callback.on_save_checkpoint(None, module, checkpoint)
    once = dict(checkpoint)
    assert set(once["state_dict"]) == trained | moved
    assert (once["epoch"], once["hyper_parameters"]) == (3, {"lr": 1.0})
    callback.on_save_checkpoint(None, module, checkpoint)
    assert checkpoint == once

    merge_lora(module)
    plain = {"state_dict": module.state_dict()}
    callback.on_save_checkpoint(None, module, plain)
    assert set(plain["state_dict"]) == set(Lit(batch_norm=True).state_dict())


@pytest.mark.parametrize("number", [1, 2])
def test_files_of_every_format_are_read(number):
    path = Path(__file__).parents[1] / "fixtures" / f"format_{number}.ckpt"
    recorded = load(path)
    assert recorded["lightning_lora"]["format"] == number
    assert set(recorded["lightning_lora"]) >= {"config", "base"}
    module = load_from_checkpoint(Lit, path)
    A, B = (recorded["state_dict"][f"net.layers.0.q.lora.default.{name}"] for name in "AB")
    x, plain = torch.randn(5, 16), Lit().net.layers[0].q
    expected = plain(x) + x @ A.T @ B.T * (4 / 2)
    assert torch.allclose(module.eval().net.layers[0].q(x), expected, atol=1e-6)
    lora = LoRACallback(r=2, alpha=4, targets=["q", "v"], dropout=0.1, lr_scale=3.0, seed=0)
    trainer(lora, max_epochs=2).fit(Lit(), data(), ckpt_path=path)


def test_a_file_of_a_later_format_says_so(tmp_path):
    recorded = load(Path(__file__).parents[1] / "fixtures" / "format_2.ckpt")
    recorded["lightning_lora"]["format"] = 3
    torch.save(recorded, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"its format is 3, and 2 is the newest known\).* a later version"):
        load_from_checkpoint(Lit, tmp_path / "later.ckpt")


def test_statistics_of_batch_norm_move_and_travel(tmp_path):
    saved = fit(tmp_path, 1, None, lambda: Lit(batch_norm=True))["state_dict"]
    assert {key for key in saved if key not in ADAPTERS} == {
        "net.bn.running_mean",
        "net.bn.running_var",
        "net.bn.num_batches_tracked",
    }
    assert saved["net.bn.num_batches_tracked"] == 8


def test_best_after_the_merge_equals_a_fresh_unmerged_run_and_leaves_the_module_as_found(tmp_path):
    files = checkpoints(tmp_path)
    module, runner = Lit(batch_norm=True, lr=0.3), trainer(LoRACallback(r=4), files, max_epochs=4)
    runner.fit(module, data(), data(1))
    best, last = load(files.best_model_path), load(files.last_model_path)
    assert best["epoch"] != last["epoch"], "the test must tell the best from the last"
    merged = {name: value.clone() for name, value in module.state_dict().items()}
    kwargs = {"dataloaders": data(2), "ckpt_path": files.best_model_path, "verbose": False}
    fresh = trainer(LoRACallback(r=4)).test(Lit(batch_norm=True), **kwargs)
    last_too = runner.test(module, data(2), verbose=False)
    for again in (runner, trainer(LoRACallback(r=4)), runner):
        assert again.test(module, **kwargs) == fresh != last_too
        assert same(dict(module.state_dict()), merged)
        assert again.test(module, data(2), verbose=False) == last_too
    unmerge_lora(module)
    assert same(
        {k: v for k, v in lora_state_dict(module).items() if k in ADAPTERS},
        {key: value for key, value in last["state_dict"].items() if key in ADAPTERS},
    )


def test_merge_best_takes_everything_that_the_best_file_holds(tmp_path):
    files = checkpoints(tmp_path, mode="max")
    module = Lit(batch_norm=True, lr=0.3)
    callback = LoRACallback(r=4, merge="best", also_train=["head"])
    trainer(callback, files, max_epochs=4).fit(module, data(), data(1))
    best, last = load(files.best_model_path)["state_dict"], load(files.last_model_path)["state_dict"]
    assert load(files.best_model_path)["epoch"] < 3, "the test must tell the best from the last"
    plain = net(batch_norm=True)
    for name, value in module.net.state_dict().items():
        expected = best.get(f"net.{name}", plain.state_dict()[name])
        if f"net.{name.removesuffix('.weight')}.lora.default.A" in best:
            prefix = f"net.{name.removesuffix('.weight')}.lora.default"
            expected = expected + best[f"{prefix}.B"] @ best[f"{prefix}.A"]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(module.net.head.weight, last["net.head.weight"])
    assert torch.equal(module.net.bn.running_mean, best["net.bn.running_mean"])


def test_a_file_after_the_merge_is_the_plain_merged_model(tmp_path):
    module, runner = Lit(), trainer(LoRACallback(r=4))
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "merged.ckpt")
    checkpoint = load(tmp_path / "merged.ckpt")
    assert set(checkpoint["state_dict"]) == BASE and "lightning_lora" not in checkpoint
    plain = Lit.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert same(dict(plain.state_dict()), dict(module.state_dict()))
    assert not torch.equal(plain.net.layers[0].q.weight, net().layers[0].q.weight)


def test_no_sequence_applies_an_adapter_twice(tmp_path):
    files = checkpoints(tmp_path)
    module, spy, runner = Lit(), Spy(), trainer(LoRACallback(r=4), files)
    runner.fit(module, data(), data(1))
    merged = runner.test(module, data(2), verbose=False)
    for _ in range(2):
        assert trainer(LoRACallback(r=4)).test(module, data(2), verbose=False) == merged
        trainer(LoRACallback(r=4)).test(module, data(2), ckpt_path=files.last_model_path, verbose=False)
    trainer(LoRACallback(r=4), spy, max_epochs=1).fit(module, data(), data(1))
    assert all(torch.equal(spy.base[f"net.{name}"], p) for name, p in net().named_parameters())
    unmerge_lora(module)
    remove_lora(module)
    assert same(dict(module.net.state_dict()), dict(net().state_dict()))


def test_a_tested_fresh_module_keeps_what_was_loaded(tmp_path):
    files = checkpoints(tmp_path)
    trainer(LoRACallback(r=4), files).fit(Lit(), data(), data(1))
    module = Lit()
    trainer(LoRACallback(r=4)).test(module, data(2), ckpt_path=files.last_model_path, verbose=False)
    saved = load(files.last_model_path)["state_dict"]
    assert same({name: p.detach() for name, p in lora_parameters(module)}, saved)
    assert all(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------- refusals


def other_base() -> Lit:
    module = Lit()
    with torch.no_grad():
        module.net.layers[0].mlp.weight[3, 3] += 0.5
    return module


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(folder, 1)
    return folder / "last.ckpt"


def edited(file: Path, path: Path, edit) -> Path:
    checkpoint = load(file)
    edit(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return path


def test_other_arguments_and_another_base_are_refused_and_nothing_is_changed(file):
    cases = [
        ({"r": 2}, Lit, r"was written with `r=4` instead of `r=2`: give the callback the same arguments"),
        ({"alpha": 32}, Lit, r"was written with `alpha=None` instead of `alpha=32`"),
        ({"targets": "qv"}, Lit, r"was written with `targets='attn'` instead of `targets='qv'`"),
        ({"name": "other"}, Lit, r"`name='default'` instead of `name='other'`"),
        ({}, other_base, r"trained on another base: `net.layers.0.mlp.weight` has other values"),
        ({}, lambda: Lit(batch_norm=True), r"another base: `net.bn.weight` is only in the model"),
    ]
    for arguments, cls, words in cases:
        module = cls()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            trainer(LoRACallback(**{"r": 4, **arguments})).fit(module, data(), ckpt_path=file)
        assert same(dict(module.state_dict()), before)


def test_broken_files_are_refused_before_anything_is_loaded(file, tmp_path):
    q = "net.layers.0.q.lora.default.A"
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(file.read_bytes()[:5000])
    corrupt = tmp_path / "corrupt.ckpt"
    corrupt.write_bytes(b"nothing of the kind" * 100)
    full = tmp_path / "full.ckpt"
    plain = trainer(max_epochs=1)
    plain.fit(Lit(), data())
    plain.save_checkpoint(full)
    cases = [
        (truncated, "cannot be read; is the file truncated"),
        (corrupt, "cannot be read; is the file truncated"),
        (full, "is a full checkpoint, without adapters.*load them into the module as its base"),
        (edited(file, tmp_path / "1", lambda s: s.pop(q)), f"it lacks `{re.escape(q)}`"),
        (
            edited(file, tmp_path / "2", lambda s: s.update(extra=torch.ones(1))),
            "it holds `extra`",
        ),
        (
            edited(file, tmp_path / "3", lambda s: s.update({q: torch.ones(3, 16)})),
            r"has shape \(3, 16\).*needs \(4, 16\)",
        ),
    ]
    for path, words in cases:
        module = Lit()
        with pytest.raises(ValueError, match=words):
            trainer(LoRACallback(r=4)).fit(module, data(), ckpt_path=path)
        assert same(dict(module.state_dict()), dict(Lit().state_dict())), path


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        trainer(LoRACallback(r=4)).test(Lit(), data(), ckpt_path=tmp_path / "none.ckpt")


def test_without_the_callback_the_file_is_refused(file):
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(max_epochs=1).fit(Lit(), data(), ckpt_path=file)


def test_the_same_base_in_bf16_is_no_other_base(file):
    module = Lit().bfloat16().float()
    with pytest.warns(UserWarning, match="differs in low bits"):
        trainer(LoRACallback(r=4)).test(module, data(), ckpt_path=file, verbose=False)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    module, runner = Lit(), trainer(LoRACallback(r=4, merge=False), max_epochs=1)
    target = tmp_path / "run.ckpt"

    class SaveTwice(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(target)
            self.first = target.read_bytes()

            def torn(checkpoint, file):
                file.write(b"half")
                raise SystemError("the disk is full")

            monkeypatch.setattr(torch, "save", torn)
            with pytest.raises(SystemError):
                trainer.save_checkpoint(target)

    runner.callbacks.append(spy := SaveTwice())
    runner.fit(module, data())
    assert target.read_bytes() == spy.first
    assert load(target)["state_dict"].keys() == ADAPTERS
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_file_is_put_in_the_place_of_the_old_one_and_not_written_over_it(tmp_path):
    target, held = tmp_path / "run.ckpt", tmp_path / "held"

    class SaveTwice(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(target)
            if not held.exists():
                os.link(target, held)
                self.first = held.read_bytes()

    spy = SaveTwice()
    trainer(LoRACallback(r=4), spy).fit(Lit(), data())
    assert held.read_bytes() == spy.first != target.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"run.ckpt", "held"}


# ---------------------------------------------------------------- company


@pytest.mark.slow
def test_averaging_trains_resumes_and_saves_adapters_alone(tmp_path):
    for name, averaging in (
        ("ema", lambda: EMAWeightAveraging(decay=0.9)),
        ("swa", lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)),
    ):
        four = fit(tmp_path / name / "a", 4, None, Lit, averaging())
        fit(tmp_path / name / "b", 2, None, Lit, averaging())
        resumed = fit(tmp_path / name / "c", 4, tmp_path / name / "b" / "last.ckpt", Lit, averaging())
        assert not {key.removeprefix("module.") for key in tensor_names(four)} & BASE
        assert same(resumed["state_dict"], four["state_dict"]), name


def test_averaged_adapters_are_what_is_merged(tmp_path):
    class Current(Spy):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.current = {n: p.detach().clone() for n, p in lora_parameters(pl_module)}

    module, spy = Lit(), Current()
    trainer(LoRACallback(r=4), EMAWeightAveraging(decay=0.9), spy).fit(module, data(), data(1))
    unmerge_lora(module)
    merged = dict(lora_parameters(module))
    assert not any(torch.equal(merged[name], spy.current[name]) for name in merged if name.endswith("B"))
    assert all(torch.equal(module.net.get_parameter(name), p) for name, p in net().named_parameters())
