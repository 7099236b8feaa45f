"""Runs on a base whose linear layers hold quantized tensors, from the start to a file that a fresh base loads."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lora import LoRACallback, load_from_checkpoint, lora_parameters, lora_state_dict, use_adapters
from lightning_lora.ops.packed.quantized_tensors import stored_tensors
from tests.helpers.models import Block, Lit, checkpoints, data, trainer
from tests.helpers.quantized_tensors import FORMATS, quantize


class WideNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 128), nn.Linear(128, 3)
        self.layers = nn.Sequential(Block(128), Block(128))

    def forward(self, x):
        return self.head(self.layers(self.up(x)))


class Quantized(Lit):
    """Its blocks come quantized, all of their linear layers."""

    kind = "toy"

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = WideNet()
        quantize(self.net.layers, kind or self.kind)


def in_full() -> Lit:
    """The module before its quantization."""
    module = Lit()
    module.net = WideNet()
    return module


def run(folder, kind: str, epochs: int = 2, ckpt: object = None, **kwargs: object):
    files, module = checkpoints(folder, monitor=None), Quantized(kind)
    runner = trainer(LoRACallback(r=4), files, max_epochs=epochs, **kwargs)
    runner.fit(module, data(), ckpt_path=ckpt)
    return runner, module, files


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_trains_and_a_fresh_base_tests_the_same(tmp_path, kind, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.trainer.end_of_fit.rank_zero_info", said.append)
    runner, module, files = run(tmp_path, kind)
    assert "Quantized weights cannot hold the sum, so nothing is merged" in said[0]
    assert all(bool(p.any()) for name, p in lora_parameters(module))
    saved = torch.load(files.last_model_path, weights_only=True)
    assert sorted(saved["state_dict"]) == sorted(name for name, _ in lora_parameters(module))
    own = runner.test(module, data(2), verbose=False)
    assert runner.test(module, data(2), ckpt_path=files.last_model_path, verbose=False) == own
    fresh = trainer(LoRACallback(r=4))
    assert fresh.test(Quantized(kind), data(2), ckpt_path=files.last_model_path, verbose=False) == own
    with use_adapters(module, None):
        assert trainer().test(module, data(2), verbose=False) != own


@pytest.mark.parametrize("kind", ["toy", "int8-dynamic"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, kind):
    four = lora_state_dict(run(tmp_path / "four", kind, 4)[1])
    run(tmp_path / "two", kind, 2)
    resumed = lora_state_dict(run(tmp_path / "resumed", kind, 4, tmp_path / "two" / "last.ckpt")[1])
    assert all(torch.equal(four[key], resumed[key]) for key in four)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_another_precision_keeps_the_codes(precision):
    module = Quantized("toy")
    before = [part.clone() for part in stored_tensors(module.net.layers[0].q.weight)]
    trainer(LoRACallback(r=4), precision=precision, max_steps=2).fit(module, data())
    codes, scale = stored_tensors(module.net.layers[0].q.weight)
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1].to(scale.dtype))
    assert all(p.dtype == torch.float32 and bool(p.any()) for _, p in lora_parameters(module))


def test_an_average_of_codes_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="WeightAveraging averages every parameter, and the model has"):
        trainer(LoRACallback(r=4), WeightAveraging()).fit(Quantized("toy"), data())
    trainer(LoRACallback(r=4), WeightAveraging()).fit(in_full(), data())  # one of the remedies


def test_an_average_of_codes_stored_as_numbers_is_refused_and_one_beside_integers_keeps_them():
    pytest.importorskip("bitsandbytes")
    from tests.helpers.quantized import Wide, four_bits

    for storage in (torch.float32, torch.uint8):
        module = Wide()
        layer = module.net.layers[0].q = four_bits(module.net.layers[0].q, quant_storage=storage)
        before, runner = layer.weight.clone(), trainer(LoRACallback(r=4), EMAWeightAveraging(decay=0.5), max_steps=4)
        if storage == torch.uint8:
            runner.fit(module, data())
            assert torch.equal(module.net.layers[0].q.weight, before)
            continue
        with pytest.raises(MisconfigurationException, match="EMAWeightAveraging averages every parameter, and the"):
            runner.fit(module, data())


def test_a_base_of_another_form_is_refused_by_name(tmp_path):
    path = run(tmp_path, "toy", 1)[2].last_model_path
    plain = in_full()
    with pytest.raises(ValueError, match=r"is of torch.float32 in it and a DynamicInt8 here: load the base before it"):
        load_from_checkpoint(Quantized("toy"), path, base=plain)
    assert load_from_checkpoint(Quantized("toy"), path) is not None
