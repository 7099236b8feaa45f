"""Modules that build their head anew in every stage, against a module that builds it once and is never merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, TuneCallback, lora_parameters, remove_adapted, remove_lora, unmerge_lora
from lightning_lora.layers.base import is_adapted
from tests.helpers.models import Lit, checkpoints, data, net, trainer

X = data(5).dataset.tensors[0]
ADAPTED, IN_FULL = {"targets": ["q", "head"]}, {"targets": ["q"], "also_train": ["head"]}


class Rebuilds(Lit):
    """As models of pyannote.audio: a new head in every stage, and when a file is loaded, with the old weights."""

    def build(self) -> None:
        self.net.head = nn.Linear(16, 3)

    def setup(self, stage: str | None = None) -> None:
        old = self.state_dict()
        self.build()
        self.load_state_dict(old, strict=False)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.setup()


def fit(module, *callbacks, seed=0, epochs=1, path=None, **arguments):
    runner = trainer(LoRACallback(r=4, **arguments), *callbacks, max_epochs=epochs)
    runner.fit(module, data(seed, 16), data(1, 16), ckpt_path=path)
    return runner


def evaluated(runner, module, path=None):
    return runner.test(module, data(2, 16), ckpt_path=path, verbose=False)


def outputs(module):
    return module.eval()(X)


CASES = [
    pytest.param(IN_FULL, True, id="in full, merged"),
    pytest.param(ADAPTED, "best", id="adapted, best"),
    pytest.param(ADAPTED, True, id="adapted, merged", marks=pytest.mark.slow),
    pytest.param(ADAPTED, False, id="adapted, live", marks=pytest.mark.slow),
    pytest.param(IN_FULL, False, id="in full, live", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arguments", "merge"), CASES)
def test_a_head_that_is_built_anew_in_every_stage(tmp_path, arguments, merge):
    oracle, module, files = Lit(), Rebuilds(), checkpoints(tmp_path)
    once = fit(oracle, checkpoints(tmp_path / "oracle"), merge=False, **arguments)
    runner = fit(module, files, merge=merge, **arguments)
    path = files.last_model_path
    torch.testing.assert_close(outputs(module), outputs(oracle), rtol=1e-5, atol=1e-5)
    evaluated(runner, module)
    assert evaluated(runner, module, "best") == evaluated(once, oracle)
    assert is_adapted(module) == (merge is False)
    torch.testing.assert_close(outputs(module), outputs(oracle), rtol=1e-5, atol=1e-5)
    resumed, whole = Rebuilds(), Lit()
    fit(resumed, epochs=2, path=path, merge=False, **arguments)
    fit(whole, epochs=2, merge=False, **arguments)
    assert torch.equal(outputs(resumed), outputs(whole)), "a resumed run"
    fit(module, seed=3, merge=merge is not False, **arguments)
    fit(oracle, seed=3, merge=False, **arguments)
    torch.testing.assert_close(outputs(module), outputs(oracle), rtol=1e-5, atol=1e-5), "a second fit"
    remove_lora(module)
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in module.net.state_dict().items())


def test_the_merge_into_a_rebuilt_head_can_be_undone():
    module = Rebuilds()
    runner = fit(module, **ADAPTED)
    evaluated(runner, module)
    unmerge_lora(module)
    weights = {key: value for key, value in module.net.state_dict().items() if ".lora." not in key}
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in weights.items())
    assert dict(lora_parameters(module))["net.head.lora.default.B"].any()


class Redraws(Rebuilds):
    """Its new head has weights of its own."""

    def setup(self, stage: str | None = None) -> None:
        self.build()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        pass


def test_a_head_with_other_weights_starts_anew_with_a_warning():
    module = Redraws()
    fit(module, merge=False, **ADAPTED)
    with pytest.warns(UserWarning, match="`net.head` was replaced by a layer with other weights, by a hook of Redraws"):
        fit(module, merge=False, seed=3, **ADAPTED)


def test_a_merged_module_that_draws_its_head_in_every_stage_takes_the_trained_head_from_a_file(tmp_path):
    module, files = Redraws(), checkpoints(tmp_path)
    runner = fit(module, files, **IN_FULL)
    weight, path = module.net.layers[0].q.weight.clone(), files.last_model_path
    result = evaluated(runner, module, path)
    assert result == evaluated(trainer(LoRACallback(r=4, **IN_FULL)), Redraws(), path)
    assert torch.equal(module.net.layers[0].q.weight, weight) and not is_adapted(module)
    assert torch.equal(module.net.head.weight, torch.load(path)["state_dict"]["net.head.weight"])


def test_a_file_for_a_head_that_was_drawn_again_is_refused_and_the_module_stays_merged(tmp_path):
    module, files = Redraws(), checkpoints(tmp_path)
    runner = fit(module, files, **ADAPTED)
    with pytest.raises(ValueError, match=r"trained on another base: `net.head.weight` has other values"):
        evaluated(runner, module, files.last_model_path)
    assert not is_adapted(module)


class RedrawsLate(Rebuilds):
    def setup(self, stage: str | None = None) -> None:
        pass

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.build()


@pytest.mark.parametrize("merge", [True, False])
def test_a_file_for_other_weights_is_refused_and_nothing_stays_changed(tmp_path, merge):
    module, files = RedrawsLate(), checkpoints(tmp_path)
    runner = fit(module, files, merge=merge, **ADAPTED)
    words = r"`on_load_checkpoint` of RedrawsLate replaced layers, .*: `net.head.weight` has other values. Copy the old"
    with pytest.raises(ValueError, match=words):
        evaluated(runner, module, files.last_model_path)
    assert is_adapted(module) == (merge is False)
    fresh = RedrawsLate()
    with pytest.raises(ValueError, match=words):
        evaluated(trainer(LoRACallback(r=4, **ADAPTED)), fresh, files.last_model_path)
    assert not is_adapted(fresh)


def test_a_head_that_is_trained_in_full_takes_its_values_from_the_file(tmp_path):
    module, files = RedrawsLate(), checkpoints(tmp_path)
    runner = fit(module, files, merge=False, **IN_FULL)
    expected = evaluated(runner, module)
    assert evaluated(trainer(LoRACallback(r=4, **IN_FULL)), RedrawsLate(), files.last_model_path) == expected


def test_the_table_is_shown_once_where_the_hook_calls_setup_again(tmp_path, log):
    files = checkpoints(tmp_path)
    fit(Rebuilds(), files, **IN_FULL)
    log.clear()
    fit(Rebuilds(), epochs=2, path=files.last_model_path, **IN_FULL)
    assert sum(message.startswith("LoRA adapts") for message in log) == 1


@pytest.mark.parametrize("train", ["head", pytest.param("all", marks=pytest.mark.slow)])
def test_a_part_that_is_built_anew_keeps_what_was_trained(tmp_path, train):
    def run(module, epochs=1, path=None, *callbacks):
        trainer(TuneCallback(train), *callbacks, max_epochs=epochs).fit(
            module, data(0, 16), data(1, 16), ckpt_path=path
        )

    module, oracle, files = Rebuilds(), Lit(), checkpoints(tmp_path)
    run(module, 1, None, files)
    run(oracle)
    assert torch.equal(outputs(module), outputs(oracle))
    resumed, whole = Rebuilds(), Lit()
    run(resumed, 2, files.last_model_path)
    run(whole, 2)
    assert torch.equal(outputs(resumed), outputs(whole))
    run(module)
    remove_adapted(module)
    assert torch.equal(outputs(module), outputs(Lit()))
