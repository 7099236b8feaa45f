"""Task embeddings in a run: the segments of every batch, and the files."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import AdapterCallback, load_from_checkpoint, use_segments
from lightning_lora.methods.bottleneck.segments import acting_in
from tests.helpers.models import LitEncoder, checkpoints, trainer
from tests.helpers.runs import load, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended"),
]


def batches(seed=0):
    """Sequences of four vectors, their classes, and a segment for each vector."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y, torch.randint(0, 2, (32, 4), generator=generator)), batch_size=8)


def callback(segments=2, **arguments):
    return AdapterCallback(3, "block", segments=segments, segment_count=2, also_train=["head"], **arguments)


class BySteps(LitEncoder):
    """Says the segments itself."""

    def loss(self, batch):
        with use_segments(self, batch[2]):
            return super().loss(batch)


def fit(module, segments=2, epochs=2, files=None, ckpt=None):
    parts = [callback(segments)] + ([files] if files else [])
    torch.manual_seed(5)
    trainer(*parts, max_epochs=epochs).fit(module, batches(), batches(1), ckpt_path=ckpt)
    return module


def test_a_run_sets_the_segments_of_each_batch():
    routed, by_steps = fit(LitEncoder(dropout=0.1)), fit(BySteps(dropout=0.1), segments=None)
    state = routed.state_dict()
    assert same(state, by_steps.state_dict())
    assert bool(state["net.layers.0.bottleneck.segment_embedding"].any())
    assert acting_in(routed).choice is None, "they end with the batch"


def test_evaluation_and_prediction_have_segments_too(tmp_path):
    files = checkpoints(tmp_path)
    module = fit(LitEncoder(), files=files)
    x, _, segments = next(iter(batches(1)))
    runner = trainer(callback())
    with use_segments(module.eval(), segments):
        expected = module(x)
    assert torch.equal(runner.predict(module, batches(1))[0], expected)
    runner.test(module, batches(1), verbose=False)
    again = load_from_checkpoint(LitEncoder, files.last_model_path).eval()
    with use_segments(again, segments):
        assert torch.equal(again(x), expected)


def test_a_resumed_run_is_bit_identical(tmp_path):
    four, two, resumed = (checkpoints(tmp_path / name) for name in ("four", "two", "resumed"))
    fit(LitEncoder(dropout=0.1), epochs=4, files=four)
    fit(LitEncoder(dropout=0.1), epochs=2, files=two)
    fit(LitEncoder(dropout=0.1), epochs=4, files=resumed, ckpt=two.last_model_path)
    states = [load(files.last_model_path)["state_dict"] for files in (four, resumed)]
    assert same(*states)


def test_a_file_with_another_number_of_segments_is_refused(tmp_path):
    files = checkpoints(tmp_path)
    fit(LitEncoder(), files=files)
    other = AdapterCallback(3, "block", segments=2, segment_count=3, also_train=["head"])
    with pytest.raises(ValueError, match="`segment_count=2` instead of `segment_count=3`"):
        trainer(other, max_epochs=3).fit(LitEncoder(), batches(), batches(1), ckpt_path=files.last_model_path)


def test_a_batch_without_the_entry():
    with pytest.raises(ValueError, match=r"`segments=3` must be an entry of every batch, .* is a list of 3"):
        fit(LitEncoder(), segments=3)


def test_an_error_in_a_step_takes_the_segments_off():
    class Failing(LitEncoder):
        def training_step(self, batch, index):
            self.acting = acting_in(self)
            assert self.acting.choice is not None
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(module)
    assert module.acting.choice is None


def test_a_copy_of_the_callback_is_its_configuration_alone():
    own = callback()
    trainer(own).fit(LitEncoder(), batches(), batches(1))
    assert copy.deepcopy(own).config == own.config
    trainer(copy.deepcopy(own)).fit(LitEncoder(), batches(), batches(1))


def test_on_the_command_line():
    flags = ["--trainer.callbacks=AdapterCallback", "--trainer.callbacks.placement=block"]
    flags += ["--trainer.callbacks.segments=task", "--trainer.callbacks.segment_count=2", "--trainer.logger=false"]
    made = LightningCLI(LitEncoder, run=False, save_config_callback=None, args=flags)
    (own,) = [each for each in made.trainer.callbacks if isinstance(each, AdapterCallback)]
    assert (own.config.segments, own.config.segment_count) == ("task", 2)
