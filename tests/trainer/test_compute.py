"""Runs on the weight's side: the same bits after an interruption, the same course as on the other side, files alike."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from lightning_lora import LoRACallback, lora_parameters
from lightning_lora.layers.base import adapted_layers
from lightning_lora.layers.sums.reading import summed_weight
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.oracles import same_bits
from tests.helpers.runs import Break, load
from tests.helpers.scripts import run_script
from tests.helpers.weight_side import SIDES, assert_close, counted_sums


def fitted(*callbacks, module=None, ckpt=None, compute="weights", **settings):
    """A module that was trained on shuffled data with accumulation, and its Trainer."""
    module = Lit() if module is None else module
    torch.manual_seed(5)
    runner = trainer(LoRACallback(r=4, merge=False, compute=compute), *callbacks, accumulate_grad_batches=2, **settings)
    runner.fit(module, data(shuffle=True), data(1), ckpt_path=ckpt)
    return module, runner


def sides(module):
    x = torch.zeros(2, 16)
    with torch.no_grad():  # the base is trainable again, as it was before the run
        return {summed_weight(layer, x) is not None for _, layer in adapted_layers(module)}


def differing(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return [name for name in first if not same_bits(first[name], second[name])]


@pytest.mark.parametrize("compute", SIDES)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(compute, tmp_path):
    whole, _ = fitted(compute=compute, max_epochs=3)
    fitted(checkpoints(tmp_path), compute=compute, max_epochs=1)
    resumed, _ = fitted(compute=compute, max_epochs=3, ckpt=tmp_path / "last.ckpt")
    assert differing(resumed, whole) == []
    assert sides(whole) == {compute == "weights"}


class HalfForValidation(Callback):
    """Validates with other values of the adapters, written through ``.data``; each batch ends with a part of a pass."""

    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            module.net.layers[1](torch.ones(1, 16))

    def on_validation_start(self, trainer, module):
        for _, parameter in lora_parameters(module):
            parameter.data.mul_(0.5)

    def on_validation_end(self, trainer, module):
        for _, parameter in lora_parameters(module):
            parameter.data.mul_(2)


def test_validation_sees_weights_that_were_exchanged_through_data():
    losses = []
    for side in SIDES:
        _, runner = fitted(HalfForValidation(), compute=side, max_epochs=2)
        losses.append(runner.callback_metrics["val_loss"])
    assert_close(*losses)


def test_a_run_that_breaks_in_an_epoch_is_resumed(tmp_path):
    whole, _ = fitted(checkpoints(tmp_path / "whole"), max_epochs=2)
    with pytest.raises(RuntimeError, match="broken"):
        fitted(checkpoints(tmp_path), Break(RuntimeError("broken"), at=6), max_epochs=2)
    resumed, _ = fitted(checkpoints(tmp_path), max_epochs=2, ckpt=tmp_path / "last.ckpt")
    assert differing(resumed, whole) == []


def test_both_sides_have_the_same_course():
    (first, _), (second, _) = (fitted(compute=side) for side in SIDES)
    for present, expected in zip(first.parameters(), second.parameters(), strict=True):
        assert (present - expected).abs().max() < 2e-4  # Adam divides by small numbers
    assert any(not same_bits(*pair) for pair in zip(first.parameters(), Lit().parameters(), strict=False))


@pytest.mark.parametrize("first", SIDES)
def test_a_file_of_one_side_resumes_on_the_other(first, tmp_path):
    fitted(checkpoints(tmp_path), compute=first, max_epochs=1)
    saved = load(tmp_path / "last.ckpt")
    assert "compute" not in saved["lightning_lora"]["config"]
    other = "activations" if first == "weights" else "weights"
    with counted_sums() as sums:
        resumed, runner = fitted(compute=other, max_epochs=2, ckpt=tmp_path / "last.ckpt")
    assert bool(sums) == (other == "weights")
    assert runner.current_epoch == 2 and sides(resumed) == {other == "weights"}
    whole, _ = fitted(compute=first, max_epochs=2)
    for present, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert (present - expected).abs().max() < 2e-4


@pytest.mark.parametrize("first", SIDES)
def test_a_second_fit_takes_the_side_that_it_asks_for(first):
    other = "activations" if first == "weights" else "weights"
    module, _ = fitted(compute=first, max_epochs=1)
    assert sides(module) == {first == "weights"}
    fitted(compute=other, max_epochs=1, module=module)
    assert sides(module) == {other == "weights"}


@pytest.mark.parametrize("merge", [True, "best"])
def test_the_merge_gives_what_the_run_computed(merge, tmp_path):
    module = Lit()
    callback = LoRACallback(r=4, merge=merge, compute="weights")
    files = checkpoints(tmp_path)
    runner = trainer(callback, files, max_epochs=2)
    runner.fit(module, data(), data(1))
    assert not [*adapted_layers(module)]
    x = data(9).dataset.tensors[0]
    tested, live = Lit(), trainer(LoRACallback(r=4, merge=False, compute="weights"), max_epochs=2)
    best = files.best_model_path if merge == "best" else tmp_path / "last.ckpt"
    live.test(tested, data(2), ckpt_path=str(best), verbose=False)
    assert_close(module(x), tested(x))


def test_validation_between_steps_reads_no_old_sum():
    """Loss of each validation, against the same values on the other side."""
    losses = []
    for side in SIDES:
        _, runner = fitted(compute=side, max_epochs=1, val_check_interval=2)
        losses.append(runner.callback_metrics["val_loss"])
    assert_close(*losses)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision):
    models = [fitted(compute=side, max_epochs=1, precision=precision)[0] for side in SIDES]
    before = Lit()
    x = data(9).dataset.tensors[0]
    outputs = [model.float()(x) for model in models]
    moved = (outputs[1] - before(x)).abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < 0.25 * moved


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="`compute='weights'`"):
        LoRACallback(r=4, dropout=0.1, compute="weights")


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_the_formula():
    done = run_script("weight_side_two_processes.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_lower_base_takes_the_other_side():
    """A sum with the rounded weight would differ from one with the weight."""
    assert LoRACallback(base_dtype="bf16").method.compute == "activations"
    with pytest.raises(ValueError, match="`compute='weights'` adds B A to weights that `base_dtype='bf16'` has"):
        LoRACallback(base_dtype="bf16", compute="weights")
