"""A choice is set before a step, in training and in evaluation, and is gone after it, whatever ended it."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, lora_parameters, use_adapters
from lightning_lora.trainer.checkpointing.hyperparameters import with_callbacks
from lightning_lora.trainer.strategies.base import StrategyAdapter
from tests.helpers.models import checkpoints, trainer
from tests.helpers.routed import (
    ADAPTERS,
    TASKS,
    ChoosesItself,
    RoutedLit,
    Rows,
    Trace,
    difference,
    own_run,
    rows,
    steps_of,
    values_of,
)
from tests.helpers.runs import load


def callback(**kwargs) -> LoRACallback:
    return LoRACallback(**{"r": 2, "adapters": ADAPTERS, "route": "task", "merge": False, **kwargs})


def trained() -> RoutedLit:
    """A module with adapters that do something."""
    module = RoutedLit()
    apply_lora(module, LoRAConfig(r=2, adapters=ADAPTERS))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in lora_parameters(module):
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


def choices(module) -> list:
    return [layer.lora.acting.choice for layer in module.modules() if hasattr(layer, "lora")]


def outputs(module, tasks: list) -> torch.Tensor:
    with torch.no_grad(), use_adapters(module, tasks):
        return module.eval()(Rows().x[: len(tasks)])


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_the_choice_is_gone_after_the_run(error):
    module = trained()

    class Raises(Callback):
        def on_before_zero_grad(self, runner, pl_module, optimizer):  # in the midst of a step
            assert all(choice is not None for choice in choices(pl_module))
            if runner.global_step == 3:
                raise error

    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer(callback(), Raises()).fit(module, rows())
    assert choices(module) == [None] * 8


def test_the_choice_is_gone_between_batches():
    seen = []

    class Spy(Callback):
        def on_train_epoch_end(self, runner, pl_module):
            seen.append(choices(pl_module))

        def on_validation_epoch_end(self, runner, pl_module):
            seen.append(choices(pl_module))

    module = trained()
    trainer(callback(), Spy()).fit(module, rows(), rows())
    assert len(seen) == 5 and all(each == [None] * 8 for each in seen)  # two epochs and the sanity check
    assert choices(module) == [None] * 8


def test_every_stage_takes_the_adapter_of_each_sample():
    module, data = trained(), Rows()
    expected = outputs(module, TASKS)
    loss = torch.nn.functional.cross_entropy(expected, data.y, reduction="sum") / len(data)
    runner = trainer(callback())
    predicted = runner.predict(module, rows())
    torch.testing.assert_close(torch.cat(predicted), expected, rtol=0, atol=1e-6)
    module.reduction = "mean"
    for stage in (runner.test, runner.validate):
        [metrics] = stage(module, rows(), verbose=False)
        torch.testing.assert_close(next(iter(metrics.values())), float(loss), rtol=1e-5, atol=0)


def test_a_data_loader_chooses_for_its_batches():
    module = trained()
    runner = trainer(callback(route="dataloader"))
    predicted = runner.predict(module, [DataLoader(Rows(tasks=TASKS[:8]), 8) for _ in ADAPTERS])
    for name, [output] in zip(ADAPTERS, predicted, strict=True):
        assert torch.equal(output, outputs(module, [name] * 8))
    with pytest.raises(MisconfigurationException, match="Lightning gives training_step no such index"):
        runner.fit(module, rows())


def test_a_strategy_that_hides_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(StrategyAdapter, "watches_gradients", False)
    with pytest.raises(MisconfigurationException, match=r"SingleDeviceStrategy gives an adapter that no sample used"):
        trainer(callback(), max_epochs=1).fit(module := RoutedLit(), rows())
    assert not list(lora_parameters(module))


class Untasked(Rows):
    def __getitem__(self, index):
        return {key: value for key, value in super().__getitem__(index).items() if key != "task"}


@pytest.mark.parametrize("where", ["fit", "sanity check", "predict"])
def test_a_batch_without_the_entry_is_an_error_that_leaves_the_module_bare(where):
    module, without = RoutedLit(), DataLoader(Untasked(), 8)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"`route='task'` must be an entry of every batch, .* keys 'x', 'y'"):
        if where == "predict":
            trainer(callback()).predict(module, without)
        else:
            batches = {"fit": (without,), "sanity check": (rows(), without)}[where]
            trainer(callback()).fit(module, *batches)
    assert module.state_dict().keys() == before.keys()


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_without_a_route_the_step_chooses_by_itself(checkpointing):
    trace = Trace()
    module = ChoosesItself(checkpointing=checkpointing)
    trainer(callback(route=None), trace).fit(module, rows())
    for name in ADAPTERS:
        assert difference(trace.steps, own_run(name, steps_of(2))) < 1e-6


def test_without_a_route_every_adapter_acts():
    module = RoutedLit()
    trainer(callback(route=None), max_epochs=1).fit(module, rows())
    assert all(bool(p.any()) for _, p in lora_parameters(module))


def test_a_copy_and_a_pickle_hold_the_arguments_alone():
    own = callback()
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, runner, pl_module, outputs, batch, index):
            copies.append(pickle.loads(pickle.dumps(own)))

    trainer(own, Copies(), max_steps=1, max_epochs=-1).fit(RoutedLit(), rows())
    [copied] = copies
    assert copied._chosen is None and copied._gradients is None
    assert copied.run_config == own.run_config and copied.method.names == list(ADAPTERS)


def test_the_command_line_takes_the_arguments_as_json(monkeypatch):
    arguments = [
        "program",
        "--trainer.callbacks+=lightning_lora.LoRACallback",
        '--trainer.callbacks.adapters={"fr": {}, "de": {"r": 4, "lr_scale": 2.0}}',
        "--trainer.callbacks.route=task",
        "--trainer.callbacks.balance=true",
        '--trainer.callbacks.keep={"it": 1.0}',
        '--trainer.callbacks.merge={"fr": 1.0}',
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    made = LightningCLI(RoutedLit, run=False, save_config_callback=None)
    [own] = [each for each in made.trainer.callbacks if isinstance(each, LoRACallback)]
    assert own.config == LoRAConfig(adapters={"fr": {}, "de": {"r": 4, "lr_scale": 2.0}})
    assert (own.run_config.route, own.run_config.balance) == ("task", True)
    assert (own.run_config.keep, own.run_config.merge) == ({"it": 1.0}, {"fr": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": True, "route": None}, r"without `route` no sample belongs to one adapter"),
        ({"route": ""}, r"`route` must be a key of the batch"),
        ({"keep": "it"}, r"`keep` must be a dict from names"),
        ({"keep": {"it": "all"}}, r"`keep\['it'\]` must be a number"),
        ({"keep": ["fr"]}, r"`keep` has 'fr', which this run trains"),
        ({"name": "other"}, r"`name='other'` and `adapters` both name adapters"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        callback(**arguments)


def test_loggers_and_hyperparameters_get_plain_data(tmp_path):
    own = callback(keep=["es"], balance=True, merge={"fr": 1.0})
    module = RoutedLit()
    apply_lora(module, LoRAConfig(r=2, name="es"))
    module.save_hyperparameters({"callbacks": [own]}, logger=False)
    logger = CSVLogger(tmp_path)
    files = checkpoints(tmp_path, monitor=None, save_top_k=1)
    trainer(own, files, logger=logger, max_epochs=1).fit(module, rows())
    logged = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())["lora"]
    assert (logged["adapters"], logged["route"], logged["balance"]) == (ADAPTERS, "task", True)
    assert (logged["keep"], logged["merge"]) == ({"es": 0.0}, {"fr": 1.0})
    checkpoint = with_callbacks(load(tmp_path / "last.ckpt"), {"LoRACallback": LoRACallback})
    [again] = checkpoint["hyper_parameters"]["callbacks"]
    assert (again.config, again.run_config) == (own.config, own.run_config)


def test_a_second_fit_goes_on_with_the_same_adapters():
    module, both = RoutedLit("plain"), RoutedLit("plain")
    trainer(callback(), max_epochs=2).fit(both, rows())
    for _ in range(2):
        trainer(callback(), max_epochs=1).fit(module, rows())
    twice, at_once = values_of(module), values_of(both)
    assert twice.keys() == at_once.keys() and all(torch.equal(value, at_once[key]) for key, value in twice.items())


def test_a_batch_of_kept_adapters_alone_moves_nothing():
    def run(steps: list) -> dict:
        module = RoutedLit()
        apply_lora(module, LoRAConfig(r=2, name="fr"))
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        data = DataLoader(Rows(), batch_sampler=steps)
        trainer(callback(adapters={"de": {}}, keep=["fr"]), max_epochs=1, plugins=scaler).fit(module, data)
        return values_of(module)

    _, of_fr, _, of_de, _ = steps_of()
    alone, among = run([of_de, of_de]), run([of_fr, of_de, of_fr, of_de])
    assert alone.keys() == among.keys() and all(torch.equal(value, among[key]) for key, value in alone.items())


def test_the_finders_of_batch_sizes_and_rates_choose_too():
    class Sized(RoutedLit):
        batch_size, lr = 2, 1e-3

        def train_dataloader(self):
            return rows(self.batch_size)

        def val_dataloader(self):
            return rows()

    module = Sized()
    runner = trainer(callback(), max_epochs=1)
    Tuner(runner).scale_batch_size(module, max_trials=2, steps_per_trial=1, mode="power", init_val=2)
    assert module.batch_size >= 4 and not list(lora_parameters(module))
    Tuner(trainer(callback(), max_epochs=1)).lr_find(module, num_training=4, update_attr=False)
    assert not list(lora_parameters(module))
