"""A resumed run is exact with several adapters, also with one more than the file holds, or one fewer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from tests.helpers.models import checkpoints, trainer
from tests.helpers.remedies.case import lines_of_log
from tests.helpers.routed import ADAPTERS, RoutedLit, Trace, difference, own_run, rows, steps_of, values_of
from tests.helpers.runs import load, same

TWO = {name: own for name, own in ADAPTERS.items() if name != "it"}


def fit(folder, epochs, ckpt=None, adapters=ADAPTERS, optimizer="adamw", batches=None, module=None, **kwargs):
    trace, module = Trace(), module or RoutedLit(optimizer)
    settings = {key: kwargs.pop(key) for key in ("accumulate_grad_batches",) if key in kwargs}
    own = LoRACallback(**{"r": 2, "adapters": adapters, "route": "task", "merge": False, **kwargs})
    files = checkpoints(folder / str(epochs), monitor=None, save_top_k=1)
    runner = trainer(own, trace, files, max_epochs=epochs, **settings)
    trace.steps = [{}] * (5 * 2 if ckpt else 0)  # as many steps as the first run took
    runner.fit(module, batches or rows(), ckpt_path=ckpt)
    return folder / str(epochs) / "last.ckpt", trace.steps[10 if ckpt else 0 :], module


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_and_two_epochs_are_four_bit_for_bit(tmp_path, optimizer):
    def run(folder, epochs, ckpt=None):
        return fit(folder, epochs, ckpt, optimizer=optimizer, batches=rows(4), accumulate_grad_batches=2)[0]

    four, two = run(tmp_path / "whole", 4), run(tmp_path / "parts", 2)
    resumed = load(run(tmp_path / "parts", 4, two))
    assert same(load(four)["state_dict"], resumed["state_dict"])
    expected, states = load(four)["optimizer_states"][0], resumed["optimizer_states"][0]
    for place, state in expected["state"].items():
        assert all(torch.equal(value, states["state"][place][key]) for key, value in state.items() if value is not None)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_adapter_more_starts_fresh_and_the_others_go_on(tmp_path, optimizer):
    reordered = {"it": ADAPTERS["it"], **TWO}  # the file has other places in the optimizer
    two, _, _ = fit(tmp_path, 2, adapters=TWO, optimizer=optimizer, batches=rows(without="it"))
    lines: list[str] = []
    with lines_of_log(lines):
        _, steps, _ = fit(tmp_path, 4, two, adapters=reordered, optimizer=optimizer)
    for name in TWO:
        assert difference(steps, own_run(name, steps_of(4), optimizer)[10:]) < 1e-6
    assert difference(steps, own_run("it", steps_of(2), optimizer)) < 1e-6
    assert any("last.ckpt: adapter `it` is not in the file, and starts fresh." in line for line in lines)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_adapter_fewer_stays_out_and_the_others_go_on(tmp_path, optimizer):
    two, _, _ = fit(tmp_path, 2, optimizer=optimizer)
    lines: list[str] = []
    with lines_of_log(lines):
        four, steps, _ = fit(tmp_path, 4, two, adapters=TWO, optimizer=optimizer, batches=rows(without="it"))
    for name in TWO:
        assert difference(steps, own_run(name, steps_of(4), optimizer)[10:]) < 1e-6
    assert not any(".it." in key for key in load(four)["state_dict"])
    assert any("last.ckpt: adapter `it` is not in this run, and its values stay out." in line for line in lines)


class Adagrad(RoutedLit):
    """Has its states from the beginning."""

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), 1e-2)


def test_an_adapter_more_under_an_optimizer_that_makes_its_states_at_once(tmp_path):
    two, _, _ = fit(tmp_path, 2, adapters=TWO, batches=rows(without="it"), module=Adagrad())
    module = fit(tmp_path, 4, two, module=Adagrad())[2]
    assert all(bool(value.any()) for value in values_of(module, "it").values())


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"fr": {}, "de": {"r": 2}}, r"was written with `r=4` instead of `r=2` in the adapter 'de'"),
        ({"es": {}, "pt": {}}, r"was written with the adapters 'fr', 'de' instead of 'es', 'pt'"),
    ],
)
def test_anything_else_that_differs_is_an_error(tmp_path, adapters, message):
    two, _, _ = fit(tmp_path, 2, adapters=TWO, batches=rows(without="it"))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, 4, two, adapters=adapters)


def test_a_file_of_one_adapter_goes_on_beside_another(tmp_path):
    batches = [{**batch, "task": "fr"} for batch in rows()]
    one = DataLoader(batches, batch_size=None)
    files = checkpoints(tmp_path / "one", monitor=None, save_top_k=1)
    module = RoutedLit()
    trainer(LoRACallback(r=2, name="fr", merge=False), files, max_epochs=1).fit(module, one)
    trained = values_of(module)
    own = LoRACallback(r=2, adapters={"fr": {}, "de": {}}, route="task", merge=False)
    resumed = RoutedLit()
    runner = trainer(own, max_epochs=2)
    runner.validate(resumed, one, ckpt_path=files.last_model_path, verbose=False)
    assert all(torch.equal(values_of(resumed)[key], value) for key, value in trained.items())
    runner.fit(resumed, one, ckpt_path=files.last_model_path)
    assert runner.global_step == 10
