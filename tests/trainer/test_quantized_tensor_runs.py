"""Runs on a base whose linear layers hold quantized tensors, from the start to a file that a fresh base loads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, lora_parameters, lora_state_dict, use_adapters
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
