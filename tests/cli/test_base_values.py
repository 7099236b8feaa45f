"""An adapter that was trained on a quantized base, merged in files into the base in full precision."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.cli.merge import merge_files
from lightning_lora.layers.quantized.formats import dequantized

pytest.importorskip("bitsandbytes")
from tests.helpers.quantized import four_bits


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.q, self.ln = nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64)


def quantized(**kwargs: object) -> nn.Module:
    model = Small()
    model.q = four_bits(model.q, **kwargs)
    return model


def adapter_on_a_quantized_base(folder, inside="", std=0.1):
    """Its directory, and ``B A``; ``inside`` is in front of the names of the base in the adapter's file."""
    base = quantized()
    model = nn.ModuleDict({inside.removesuffix("."): base}) if inside else base
    apply_lora(model, LoRAConfig(r=2, targets=["q"]))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, 0, std)
    save_adapter(model, folder / "adapter")
    return folder / "adapter", (base.q.lora.default.B @ base.q.lora.default.A).detach()


@pytest.mark.parametrize("start", ["", "model."])
def test_the_original_takes_the_sum_and_the_report_says_what_was_not_compared(tmp_path, capsys, start):
    adapter, delta = adapter_on_a_quantized_base(tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({start + name: value for name, value in Small().state_dict().items()}, base)
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    words = "for 1 weight of BASE only names and shapes were compared. The values of BASE may differ"
    assert words in capsys.readouterr().out
    torch.testing.assert_close(load_file(out)[f"{start}q.weight"], Small().q.weight.detach() + delta)
    assert main(["merge", str(base), str(adapter), str(out), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == [f"{start}q.weight"]


@pytest.mark.parametrize("name", ["emb.weight", "ln.bias", "q.bias"])
@pytest.mark.parametrize(("inside", "start"), [("", ""), ("", "model."), ("net.", "")])
def test_other_values_of_a_parameter_that_was_not_quantized_are_another_base(tmp_path, name, inside, start):
    """The names of the base may have a part in front that those of the adapter lack, or the reverse."""
    adapter, _ = adapter_on_a_quantized_base(tmp_path, inside)
    state = Small().state_dict()
    state[name] = state[name] + 0.5
    save_file({start + key: value for key, value in state.items()}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=rf"was trained on another base: `{inside}{name}` has other values"):
        merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_quantized_base_is_refused_and_both_remedies_work(tmp_path, storage):
    """Codes may be stored in a floating dtype."""
    adapter, delta = adapter_on_a_quantized_base(tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(quantized(quant_storage=storage).state_dict(), base)
    words = "`q.weight` is quantized, and its few bits.*base in full precision that was quantized; or give --dequantize"
    with pytest.raises(ValueError, match=words):
        merge_files(base, adapter, out)
    merge_files(base, adapter, out, dequantize=True)
    torch.testing.assert_close(load_file(out)["q.weight"], dequantized(quantized().q) + delta)
    save_file(Small().state_dict(), base)
    merge_files(base, adapter, out, overwrite=True)
    torch.testing.assert_close(load_file(out)["q.weight"], Small().q.weight.detach() + delta)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_merged_base_is_not_merged_with_the_same_adapter_again(tmp_path, dequantize):
    """No values of the quantized weights are known, so that the header of the merged file says it."""
    adapter, _ = adapter_on_a_quantized_base(tmp_path)
    base, once, twice = (tmp_path / f"{name}.safetensors" for name in ("base", "once", "twice"))
    save_file((quantized() if dequantize else Small()).state_dict(), base)
    merge_files(base, adapter, once, dequantize=dequantize)
    with pytest.raises(ValueError, match=r"once.safetensors` was merged with the adapter at .*/adapter` before, and "):
        merge_files(once, adapter, twice)
    other, other_delta = adapter_on_a_quantized_base(tmp_path / "other", std=0.2)
    merge_files(once, other, twice)
    torch.testing.assert_close(load_file(twice)["q.weight"], load_file(once)["q.weight"] + other_delta)
    for path in (adapter, other):
        with pytest.raises(ValueError, match=r"twice.safetensors` was merged with the adapter"):
            merge_files(twice, path, tmp_path / "thrice.safetensors")
    merge_files(base, {adapter: 0.0, other: 1.0}, once, overwrite=True, dequantize=dequantize)
    merge_files(once, adapter, twice, overwrite=True)


def test_weights_of_few_bits_of_another_library_are_refused(tmp_path):
    adapter, _ = adapter_on_a_quantized_base(tmp_path)
    tensors = Small().state_dict()
    tensors["q.weight"] = tensors["q.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(
        ValueError, match=r"`q.weight` is of F8_E4M3, whose few bits cannot hold the sum. Give the base"
    ):
        merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
