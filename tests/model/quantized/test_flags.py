"""A model that transformers quantized is saved and loaded as a plain one after the merge; unmerged, it is quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, save_adapter, unmerge_lora
from lightning_lora.cli.merge import merge_files
from lightning_lora.layers.quantized.formats import dequantized, is_quantized

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}


def llama(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder, **options):
    settings = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)


def adapted(model, targets=("q_proj",)):
    apply_lora(model, LoRAConfig(r=2, targets=list(targets)))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, 0, 0.1)
    return model


def flags(model) -> dict[str, object]:
    of_model = {key: value for key, value in vars(model).items() if "quant" in key or "bit" in key}
    return of_model | {f"config.{key}": value for key, value in vars(model.config).items() if "quant" in key}


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_the_merged_model_is_saved_and_loaded_as_a_plain_one(tmp_path, options):
    model = adapted(quantized(llama(tmp_path / "base"), **options))
    before, ids = flags(model), torch.arange(8)[None]
    assert before
    merge_lora(model, dequantize=True)
    assert not flags(model)
    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(map(is_quantized, loaded.modules())) and loaded.dtype == torch.float32
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    unmerge_lora(model)
    assert flags(model) == before and is_quantized(model.model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_model_of_a_quantized_checkpoint_is_saved_as_a_plain_one(tmp_path, options):
    """transformers saves by the reverse of what it did at loading, and reading codes has no reverse."""
    quantized(llama(tmp_path / "base"), **options).save_pretrained(tmp_path / "codes")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "codes"))
    conversions, ids = model._weight_conversions, torch.arange(8)[None]
    merge_lora(model, dequantize=True)
    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(map(is_quantized, loaded.modules()))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    unmerge_lora(model)
    assert model._weight_conversions is conversions


def test_the_weights_are_those_that_peft_merges_into_the_dequantized_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(quantized(llama(tmp_path / "base"), load_in_4bit=True), ("q_proj", "down_proj"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, layer in model.named_modules():
        if is_quantized(layer):
            plain.get_submodule(name).weight.data = dequantized(layer)
    save_adapter(model, tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    merge_lora(model, dequantize=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def test_a_failed_merge_keeps_what_the_configuration_knows(tmp_path, monkeypatch):
    model = adapted(quantized(llama(tmp_path), load_in_4bit=True))
    before = flags(model)
    monkeypatch.setattr("lightning_lora.model.merge.strip", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_lora(model, dequantize=True)
    assert flags(model) == before
    monkeypatch.undo()
    merge_lora(model, dequantize=True)
    monkeypatch.setattr("lightning_lora.model.merge.equip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unmerge_lora(model)
    assert not flags(model)


def test_layers_in_the_place_of_conv1d_become_conv1d(tmp_path):
    """GPT-2's layers store their weight transposed; bitsandbytes' in their place do not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=32, n_positions=16)
    plain = transformers.GPT2LMHeadModel(config)
    plain.save_pretrained(tmp_path)
    model = adapted(quantized(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4"), ["c_fc"])
    layer = model.transformer.h[0].mlp.c_fc
    assert is_quantized(layer)
    expected = dequantized(layer) + layer.lora.default.B @ layer.lora.default.A
    state = copy.deepcopy(model.state_dict())
    merge_lora(model, dequantize=True)
    assert type(layer) is type(plain.transformer.h[0].mlp.c_fc)
    torch.testing.assert_close(layer.weight, expected.T)
    plain.load_state_dict(model.state_dict(), strict=True)
    unmerge_lora(model)
    merge_lora(model, base=tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).transformer.h[0]
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, original.attn.c_attn.weight)
    unmerge_lora(model)
    assert model.state_dict().keys() == state.keys()


@pytest.mark.slow
def test_a_model_whose_files_have_other_names_merges_into_a_copy_with_its_own(tmp_path):
    """Files of ViT have other names than its modules, and the error says how to write these."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, intermediate_size=128, image_size=16, patch_size=8)
    plain = transformers.ViTForImageClassification(config)
    plain.save_pretrained(tmp_path / "theirs")
    plain.save_pretrained(tmp_path / "own", save_original_format=False)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    load = transformers.ViTForImageClassification.from_pretrained
    model = adapted(load(tmp_path / "theirs", quantization_config=settings))
    save_adapter(model, tmp_path / "adapter")
    words = r"call model.save_pretrained\(DIR, save_original_format=False\)"
    with pytest.raises(ValueError, match=words):
        merge_lora(model, base=tmp_path / "theirs")
    with pytest.raises(ValueError, match=words):
        merge_files(tmp_path / "theirs", tmp_path / "adapter", tmp_path / "out")
    merge_lora(model, base=tmp_path / "own")
    merge_files(tmp_path / "own", tmp_path / "adapter", tmp_path / "out")
    merged = load(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())
