"""The bias of a 4-bit layer: its first call casts it to the dtype in which it computes."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRACallback, load_adapter, lora_state_dict, save_adapter
from tests.helpers.models import checkpoints, data, trainer

pytest.importorskip("bitsandbytes")

from tests.helpers.quantized import Wide, Words, four_bits, words


class InBf16(Wide):
    """A module in fp32 whose 4-bit layers compute in bf16, as transformers loads one with a compute dtype alone."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.layers:
            block.q = four_bits(block.q, compute_dtype=torch.bfloat16)


@pytest.mark.slow
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


class HalfInFp32(Words):
    """A module in bf16 whose 4-bit layers compute in fp32, the default of transformers."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.layers:
            block.q, block.mlp = four_bits(block.q), four_bits(block.mlp)
        self.net.to(torch.bfloat16)


def test_a_frozen_bias_that_is_cast_is_not_moving(tmp_path):
    """Warnings are errors here. What moves would be in every file, and could not be saved for peft."""
    module = HalfInFp32()
    trainer(LoRACallback(r=4, targets=["q"]), checkpoints(tmp_path, monitor=None), max_epochs=1).fit(module, words())
    assert module.net.layers[0].q.bias.dtype == torch.float32
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(".lora." in key for key in file["state_dict"])
    save_adapter(module, tmp_path / "adapter")
    load_adapter(HalfInFp32(), tmp_path / "adapter")


def test_a_module_trains_after_a_test_in_inference_mode():
    module = InBf16()
    trainer(LoRACallback(r=4, targets=["q"])).test(module, data(), verbose=False)
    bias = module.net.layers[0].q.bias
    assert bias.dtype == torch.bfloat16 and not bias.is_inference()
    trainer(LoRACallback(r=4, targets=["q"], merge=False), max_steps=2).fit(module, data())
    assert module.net.layers[0].q.lora.default.B.any()
