"""A bias that trains has the dtype of its 4-bit layer before the optimizer comes."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRACallback, lora_state_dict
from tests.helpers.models import checkpoints, data, trainer

pytest.importorskip("bitsandbytes")

from tests.helpers.quantized import Wide, four_bits


class InBf16(Wide):
    """A module in fp32 whose 4-bit layers compute in bf16, as transformers loads one with a compute dtype alone."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.layers:
            block.q = four_bits(block.q, compute_dtype=torch.bfloat16)


def test_a_run_with_trained_biases_resumes_bit_for_bit(tmp_path):
    def run(folder: str, epochs: int, ckpt: object = None) -> dict:
        module, callback = InBf16(), LoRACallback(r=4, targets=["q"], bias="lora_only")
        runner = trainer(callback, checkpoints(tmp_path / folder, monitor=None), max_epochs=epochs)
        runner.fit(module, data(), ckpt_path=ckpt)
        assert module.net.layers[0].q.bias.dtype == torch.bfloat16
        assert module.net.layers[0].k.bias.dtype == torch.float32  # no 4-bit layer
        return lora_state_dict(module)

    whole = run("whole", 2)
    run("half", 1)
    resumed = run("resumed", 2, tmp_path / "half" / "last.ckpt")
    assert len(whole) == 6 and all(torch.equal(resumed[key], value) for key, value in whole.items())
