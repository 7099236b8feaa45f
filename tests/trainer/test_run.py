"""Runs of modules with habits of their own: what they override, keep, rebuild and interrupt stays right."""

from __future__ import annotations

import contextlib
import copy
import inspect
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torchmetrics import CatMetric

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    disable_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.layers.base import adapted_layers
from lightning_lora.model.record import merged_layers
from lightning_lora.trainer.run import Run
from tests.helpers.interrupts import bits, first_middle_last, interrupt, lines_in
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.runs import ADAPTERS, BASE, Break, load, same, types
from tests.helpers.selection import slow_except


def fitted(cls, folder, **kwargs):
    files, module = checkpoints(folder), cls()
    trainer(LoRACallback(**{"r": 4, **kwargs}), files).fit(module, data(), data(1))
    return module, files.last_model_path


class WithoutLayers(Lit):
    """Leaves its backbone out of its checkpoints, as the documentation of `strict_loading` shows it."""

    strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "layers" not in key}


class WithoutPrefix(Lit):
    """Saves the state dict of its network alone."""

    def state_dict(self, *args, **kwargs):
        return self.net.state_dict()

    def load_state_dict(self, state, **kwargs):
        return self.net.load_state_dict(state)


@pytest.mark.parametrize("cls", [WithoutLayers, WithoutPrefix])
def test_a_state_dict_of_the_users_own_changes_nothing_about_the_file(cls, tmp_path):
    _, path = fitted(cls, tmp_path)
    assert load(path)["state_dict"].keys() == ADAPTERS
    [own] = trainer(LoRACallback(r=4)).test(cls(), data(2), ckpt_path=path, verbose=False)
    [plain] = trainer(LoRACallback(r=4)).test(Lit(), data(2), ckpt_path=path, verbose=False)
    assert own == plain != trainer().test(Lit(), data(2), verbose=False)[0]


class KeepsTensors(Lit):
    """Tensors of the user's own, under names that parameters and buffers have too."""

    def __init__(self, scale=None):
        super().__init__()
        self.save_hyperparameters({"scale": torch.ones(2), "net": {"head": torch.ones(1)}})
        self.register_buffer("scale", torch.ones(2))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["scale"] = torch.full((2,), 5.0)

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["scale"]


def test_what_the_user_keeps_in_a_checkpoint_stays(tmp_path):
    _, path = fitted(KeepsTensors, tmp_path)
    checkpoint = load(path)
    assert checkpoint["hyper_parameters"]["scale"].tolist() == [1, 1]
    assert checkpoint["scale"].tolist() == [5, 5]
    module = KeepsTensors()
    trainer(LoRACallback(r=4)).test(module, data(2), ckpt_path=path, verbose=False)
    assert module.seen.tolist() == [5, 5]


class Renames(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"my.{key}": value for key, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {key[3:]: value for key, value in checkpoint["state_dict"].items()}


class Drops(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "layers.0" not in k}


def test_hooks_may_rename_but_not_drop_adapters(tmp_path):
    _, path = fitted(Renames, tmp_path)
    assert all(key.startswith("my.") for key in load(path)["state_dict"])
    trainer(LoRACallback(r=4)).test(Renames(), data(2), ckpt_path=path, verbose=False)
    module, _ = fitted(Renames, tmp_path / "best", merge="best")
    assert types(module) == types(Renames())
    with pytest.raises(
        ValueError, match=r"lacks `net\.layers\.0\.q\.lora\.default\.A`: an `on_save_checkpoint` of Drops"
    ):
        fitted(Drops, tmp_path / "drops")


class ManualRaw(Lit):
    """Steps its optimizer by itself, which Lightning does not count."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class BreakAtBatch(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            raise ValueError("broken")


def test_uncounted_steps_are_not_thrown_away():
    module = ManualRaw()
    with pytest.raises(ValueError, match="broken"):
        trainer(LoRACallback(r=4), BreakAtBatch()).fit(module, data())
    assert sum(bool(p.any()) for name, p in lora_parameters(module) if name.endswith("B")) == 8


def test_a_file_saved_outside_a_run_over_live_adapters_is_refused_with_remedies(tmp_path, capsys):
    module, runner = Lit(), trainer(LoRACallback(r=4, merge=False))
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "both.ckpt")
    with pytest.raises(ValueError, match="holds the base and live adapters together: it was saved outside a run"):
        trainer(LoRACallback(r=4)).test(Lit(), data(2), ckpt_path=tmp_path / "both.ckpt")
    again = Lit()
    apply_lora(again, LoRAConfig(r=4))
    again.load_state_dict(load(tmp_path / "both.ckpt")["state_dict"])
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    save_adapter(again, tmp_path / "adapter")
    load_adapter(other := Lit(), tmp_path / "adapter")
    assert same(dict(other.state_dict()), dict(module.state_dict()))
    assert main(["export", str(tmp_path / "both.ckpt"), str(tmp_path / "exported")]) == 1
    assert "after `fit` had returned. Use a checkpoint that the run wrote." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The base differs in low bits")
def test_a_run_in_fp16_is_evaluated_on_the_base_it_was_trained_on(tmp_path):
    files, module = ModelCheckpoint(tmp_path), Lit()
    runner = trainer(LoRACallback(r=4), files, precision="16-true", max_epochs=1)
    runner.fit(module, halves())
    first = runner.test(module, halves(2), ckpt_path=files.best_model_path, verbose=False)
    again = trainer(LoRACallback(r=4), precision="16-true")
    assert first == again.test(Lit(), halves(2), ckpt_path=files.best_model_path, verbose=False)


def halves(seed=0):
    x, y = data(seed).dataset.tensors
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.half(), y), batch_size=8)


class NewBatchNorm(SingleDeviceStrategy):
    """Puts another object in place of each BatchNorm and back, as a conversion to SyncBatchNorm does."""

    @staticmethod
    def replace(module):
        old = module.net.bn
        new = nn.BatchNorm1d(16)
        new.weight, new.bias, new.running_mean, new.running_var = (
            old.weight,
            old.bias,
            old.running_mean,
            old.running_var,
        )
        new.num_batches_tracked = old.num_batches_tracked
        module.net.bn = new

    def setup(self, trainer):
        self.replace(self.lightning_module)
        super().setup(trainer)

    def teardown(self):
        super().teardown()
        self.replace(self.lightning_module)


class LooksAtFlags(Lit):
    def configure_optimizers(self):
        self.required = {p.requires_grad for p in self.parameters()}
        return super().configure_optimizers()


def test_modules_that_a_strategy_replaces_keep_what_is_known_of_them(tmp_path):
    files, module = checkpoints(tmp_path), LooksAtFlags(batch_norm=True)
    trainer(LoRACallback(r=4), files, strategy=NewBatchNorm("cpu")).fit(module, data(), data(1))
    assert module.required == {True}, "while the user's code makes the optimizer"
    assert all(p.requires_grad for p in module.parameters())
    assert not {
        key for key in load(files.last_model_path)["state_dict"] if key in BASE | {"net.bn.weight", "net.bn.bias"}
    }
    remove_lora(module)
    assert same(dict(module.net.state_dict()), dict(net(batch_norm=True).state_dict()))


def test_a_tied_parameter_in_also_train_is_put_back():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "q": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["head"].weight.detach().clone()
    apply_lora(model, LoRAConfig(targets=["q"], also_train=["head"]))
    model["head"].weight.data.add_(1)
    with disable_lora(model):
        assert torch.equal(model["head"].weight, before)
    remove_lora(model)
    assert torch.equal(model["embed"].weight, before)


class KeepsScores(Lit):
    def __init__(self):
        super().__init__()
        self.scores = CatMetric()
        self.scores.persistent(True)

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.scores.update(self(batch[0]).detach()[:, 0])


def test_persistent_metrics_with_lists_survive_a_second_fit_and_a_test(tmp_path):
    module, path = fitted(KeepsScores, tmp_path)
    runner = trainer(LoRACallback(r=4), max_epochs=1)
    runner.fit(module, data(), data(1))
    trainer(LoRACallback(r=4)).test(module, data(2), ckpt_path=path, verbose=False)
    assert list(types(module)) == list(types(KeepsScores()))


class Sized(Lit):
    batch_size = 8

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(data(1).dataset, batch_size=self.batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", ["fit", "validate"])
def test_a_batch_size_is_tuned_and_the_module_left_as_found(merged, method, tmp_path):
    module = Sized()
    if merged:
        trainer(LoRACallback(r=4), max_epochs=1).fit(module)
    before, kinds = {k: v.clone() for k, v in module.state_dict().items()}, types(module)
    runner = trainer(LoRACallback(r=4), max_epochs=1, default_root_dir=tmp_path)
    Tuner(runner).scale_batch_size(module, method=method, max_trials=2, steps_per_trial=1, init_val=2)
    assert module.batch_size == 4
    assert types(module) == kinds and same(dict(module.state_dict()), before)
    assert all(p.requires_grad for p in module.parameters())


def test_a_learning_rate_is_found_and_the_module_left_as_found(tmp_path):
    module = Sized()
    runner = trainer(LoRACallback(r=4), max_epochs=1, default_root_dir=tmp_path)
    assert Tuner(runner).lr_find(module, num_training=4).suggestion is not None
    assert types(module) == types(Sized()) and same(dict(module.state_dict()), dict(Sized().state_dict()))


class Rebuilds(Lit):
    """Makes its network anew in every run."""

    def setup(self, stage):
        self.net = net()


def test_a_network_made_anew_in_setup_loads_its_adapters(tmp_path):
    module, path = fitted(Rebuilds, tmp_path)
    again = trainer(LoRACallback(r=4)).test(module, data(2), ckpt_path=path, verbose=False)
    assert again == trainer(LoRACallback(r=4)).test(Rebuilds(), data(2), ckpt_path=path, verbose=False)


def test_an_optimizer_that_has_stepped_before_is_restricted():
    class Early(Lit):
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), 1e-2)

        def configure_optimizers(self):
            return self.optimizer

    module = Early()
    trainer(max_epochs=1).fit(module, data())
    states = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            states.append(len(trainer.optimizers[0].state))

    trainer(LoRACallback(r=4, merge=False), Look(), max_epochs=1).fit(module, data())
    assert states == [16]


class Calibrates(Lit):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def on_validation_epoch_end(self):
        self.temperature.fill_(7.0)


def test_a_buffer_written_in_evaluation_stays_written():
    module = Calibrates()
    trainer(LoRACallback(r=4)).validate(module, data(1), verbose=False)
    assert module.temperature == 7
    assert types(module) == types(Calibrates())


@pytest.mark.parametrize("method", ["validate", "fit"])
def test_a_module_that_the_user_froze_by_apply_lora_stays_frozen(method):
    module = Lit()
    apply_lora(module, LoRAConfig(r=4))
    frozen = {name: p.requires_grad for name, p in module.named_parameters()}
    runner = trainer(LoRACallback(r=4, merge=False), max_epochs=1)
    getattr(runner, method)(module, data(1))
    assert {name: p.requires_grad for name, p in module.named_parameters()} == frozen
    merge_lora(module)
    assert all(p.requires_grad for p in module.parameters())


class Inner(Lit):
    """Has an attribute called `module`, as DDP and AveragedModel prefix their names."""

    def __init__(self):
        super().__init__()
        self.module, self.net = self.net, None
        self.head = net().head

    def forward(self, x):
        return self.module(x) + 0 * self.head(x)


def test_an_attribute_called_module_is_no_prefix(tmp_path):
    files = checkpoints(tmp_path)
    trainer(LoRACallback(r=4, also_train=["module.head"]), files, max_epochs=1).fit(Inner(), data(), data(1))
    saved = load(files.last_model_path)["state_dict"]
    assert len(saved) == 18 and {"module.head.weight", "module.head.bias"} < saved.keys()
    trainer(LoRACallback(r=4, also_train=["module.head"])).test(Inner(), data(2), ckpt_path=files.last_model_path)


def test_merging_by_oneself_at_the_end_of_training_is_no_error():
    class Merges(Callback):
        def on_train_end(self, trainer, pl_module):
            merge_lora(pl_module)

    module = Lit()
    trainer(LoRACallback(r=4), Merges(), max_epochs=1).fit(module, data())
    assert types(module) == types(Lit())


def test_the_base_loaded_over_a_merge_is_known_again():
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    learned = {name: value.clone() for name, value in lora_state_dict(module).items()}
    module.load_state_dict(Lit().state_dict())
    trainer(LoRACallback(r=4, merge=False), max_steps=0).fit(module, data())
    assert same({name: p.detach() for name, p in lora_parameters(module)}, learned)


def test_saving_and_loading_by_the_method_keeps_statistics_of_batch_norm():
    module = Lit(batch_norm=True)
    trainer(LoRACallback(r=4, merge=False), max_epochs=1).fit(module, data())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    from lightning_lora import load_lora_state_dict

    load_lora_state_dict(module, lora_state_dict(module))
    assert same(dict(module.state_dict()), before) and before["net.bn.running_mean"].any()


def test_merge_best_needs_a_metric_to_be_best_by(tmp_path):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="has no ModelCheckpoint with a `monitor`"):
        trainer(LoRACallback(r=4, merge="best"), ModelCheckpoint(tmp_path)).fit(Lit(), data())


def test_a_second_exception_does_not_hide_the_first():
    module = Lit()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, data())
    with pytest.raises(ValueError, match="first"):
        trainer(LoRACallback(r=4), Break(ValueError("first"), 1), max_epochs=1).fit(module, data())
    assert len(dict(lora_parameters(module))) == 16


class InEval(Lit):
    """Holds its network in eval mode, as Hugging Face's `from_pretrained` hands it over."""

    def __init__(self):
        super().__init__()
        self.net.eval()


class Modes(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = {module.lora.default.training for module in pl_module.net.modules() if hasattr(module, "lora")}
        x = data().dataset.tensors[0]
        with torch.random.fork_rng():
            self.same = torch.equal(pl_module(x), pl_module(x))


@pytest.mark.filterwarnings("ignore:.*train without `dropout`")
@pytest.mark.parametrize(("cls", "training"), [(InEval, False), (Lit, True)])
def test_adapters_follow_the_mode_of_their_layers(cls, training):
    modes = Modes()
    trainer(LoRACallback(r=4, dropout=0.5), modes).fit(cls(), data())
    assert modes.seen == {training}
    assert modes.same != training, "dropout acts in training and not in eval"


class BreakBeforeTheFirstStep(Callback):
    def on_train_start(self, trainer, pl_module):
        raise KeyError("no")


def all_of(module):
    """Values, flags and classes, with names."""
    values = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return values, {name: p.requires_grad for name, p in module.named_parameters()}, types(module)


@pytest.mark.parametrize("start", slow_except(["bare", "merged"], ["bare", "live", "merged"]))
@pytest.mark.parametrize("fails", ["weights only", "on_train_start", "init_from"])
def test_a_fit_that_fails_after_its_file_is_loaded_gives_back_what_the_module_had(start, fails, tmp_path):
    arguments = {"r": 2, "targets": ["q", "mlp"], "also_train": ["head"]}
    kept = ModelCheckpoint(dirpath=tmp_path, filename="a", save_weights_only=fails == "weights only")
    other = Lit(batch_norm=True)
    trainer(LoRACallback(**arguments), kept, max_epochs=1).fit(other, data(1))
    module = Lit(batch_norm=True)
    if start != "bare":
        trainer(LoRACallback(**arguments, merge=start == "merged"), max_epochs=1).fit(module, data())
    values, flags, kinds = all_of(module)
    path = {"init_from": str(tmp_path / "a.ckpt")} if fails == "init_from" else {}
    ckpt_path = None if path else tmp_path / "a.ckpt"
    callbacks = [LoRACallback(**arguments, **path), *([] if fails == "weights only" else [BreakBeforeTheFirstStep()])]
    warned = pytest.warns(UserWarning, match="was not read") if path and start != "bare" else nullcontext()
    with warned, pytest.raises(KeyError):
        trainer(*callbacks).fit(module, data(), ckpt_path=ckpt_path)
    now = all_of(module)
    assert same(now[0], values)
    assert now[1:] == (flags, kinds)


CONFIGURED = {"r": 2, "targets": ["q", "mlp"], "also_train": ["head"]}


def fit_for_two_steps(module, **kwargs):
    callback = LoRACallback(**CONFIGURED, base_dtype="bf16")
    settings = {"precision": "bf16-mixed", "max_epochs": 1, "limit_train_batches": 2}
    trainer(callback, **settings).fit(module, data(n=16), **kwargs)


def interrupted_fit(at):
    """What is wrong with a module whose fit was interrupted at the line number `at` of the package."""
    module, base = Lit(), {name: bits(value) for name, value in Lit().state_dict().items()}
    with contextlib.suppress(SystemExit, KeyboardInterrupt):  # Lightning exits after Ctrl-C
        interrupt(lambda: fit_for_two_steps(module), at)
    counts = len(list(adapted_layers(module))), len(list(merged_layers(module)))
    assert counts in ((4, 0), (0, 4), (0, 0)), at
    twin = copy.deepcopy(module)
    remove_lora(twin)
    assert {name: bits(value) for name, value in twin.state_dict().items()} == base, at
    assert all(parameter.requires_grad for parameter in twin.parameters()), at
    fit_for_two_steps(module)
    assert len(list(merged_layers(module))) == 4, at
    assert "configure_optimizers" not in vars(module), at
    remove_lora(module)
    assert {name: bits(value) for name, value in module.state_dict().items()} == base, at


def test_an_interrupt_as_the_run_ends_is_completed_by_the_next_run():
    module = Lit()
    fit_for_two_steps(module)
    module = Lit()
    lines = lines_in(lambda: fit_for_two_steps(module))
    begin = inspect.getsourcelines(Run.end)[1]
    at = [number for number, line in enumerate(lines, 1) if line == f"/trainer/run.py:{begin + 2}"]
    interrupted_fit(at[0])


@pytest.mark.slow
def test_an_interrupt_anywhere_in_a_fit_leaves_no_half():
    module = Lit()
    lines = first_middle_last(lines_in(lambda: fit_for_two_steps(module)))
    for at in lines[:: len(lines) // 25]:
        interrupted_fit(at)


def evaluate_file(module, path):
    runner = trainer(LoRACallback(**CONFIGURED))
    return runner.test(module, data(2, n=16), ckpt_path=path, verbose=False)


@pytest.mark.slow
def test_an_interrupt_anywhere_in_a_test_of_a_file_leaves_the_module_merged_with_its_bits(tmp_path):
    _, path = fitted(Lit, tmp_path, **CONFIGURED)
    module = Lit()
    trainer(LoRACallback(**CONFIGURED), max_epochs=1).fit(module, data(5))
    values, flags, kinds = all_of(module)
    expected = evaluate_file(copy.deepcopy(module), path)
    lines = first_middle_last(lines_in(lambda: evaluate_file(copy.deepcopy(module), path)))
    for at in lines[:: len(lines) // 25]:
        interrupted = copy.deepcopy(module)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            interrupt(lambda module=interrupted: evaluate_file(module, path), at)
        for _ in range(2):
            now = all_of(interrupted)
            assert same(now[0], values) and now[1:] == (flags, kinds), at
            assert evaluate_file(interrupted, path) == expected, at
        remove_lora(interrupted)
        assert same(dict(interrupted.state_dict()), dict(Lit().state_dict())), at
