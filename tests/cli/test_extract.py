"""Adapters from full fine-tunes: against the full SVD, through a merge and back, and in peft."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora.cli.extract import extract
from lightning_lora.cli.merge import merge_files
from tests.helpers.on_disk import (
    attention_pairs,
    base_tensors,
    everything_in,
    listing,
    values,
    write_adapter,
    write_base,
)

Q = "model.layers.0.self_attn.q_proj"


def tuned(tensors, size=0.1, seed=500):
    """Every tensor moved."""
    return {name: value + size * values(*value.shape, seed=seed + i) for i, (name, value) in enumerate(tensors.items())}


@pytest.mark.parametrize("shards", [1, 3])
def test_the_best_of_its_rank(tmp_path, shards):
    before, after = base_tensors(), tuned(base_tensors())
    base, other = write_base(tmp_path / "base", before, shards), write_base(tmp_path / "tuned", after)
    found = extract(base, other, tmp_path / "out", r=3)
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    kept = whole = 0.0
    for name, layer in found.layers.items():
        delta = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        S = torch.linalg.svdvals(delta)
        A, B = (stored[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
        assert float((delta - B @ A).norm()) == pytest.approx(float(S[3:].norm()), rel=1e-5)
        assert layer.energy == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-6)
        assert layer.relative == pytest.approx(float(delta.norm() / before[f"{name}.weight"].norm()), rel=1e-5)
        kept, whole = kept + float(S[:3].square().sum()), whole + float(S.square().sum())
    assert found.energy() == pytest.approx(kept / whole, rel=1e-6)
    assert len(found.layers) == 9, "eight maps of the blocks and the head"
    assert found.not_covered == {"model.embed_tokens.weight": "an embedding", "model.norm.weight": "1 dimension"}


def test_there_and_back(tmp_path):
    base, adapter = write_base(tmp_path / "base", base_tensors()), write_adapter(tmp_path / "a", attention_pairs())
    merge_files(base, adapter, tmp_path / "merged")
    found = extract(base, tmp_path / "merged", tmp_path / "again", r=3)
    assert found.layers.keys() == attention_pairs().keys()
    assert found.not_covered == {} and len(found.unchanged) == 5
    assert found.energy() == pytest.approx(1, abs=1e-9)
    merge_files(base, tmp_path / "again", tmp_path / "merged-again")
    for name, value in everything_in(tmp_path / "merged").items():
        torch.testing.assert_close(everything_in(tmp_path / "merged-again")[name], value, rtol=1e-5, atol=1e-5)


def test_maps_that_are_kept_transposed(tmp_path):
    before = {
        "h.0.fc.weight": values(6, 9),
        "h.0.fc.bias": values(9),
        "h.0.proj.weight": values(6, 6),
        "h.0.proj.bias": values(6),
        "wte.weight": values(9, 6),
        "head.weight": values(4, 6),
        "head.bias": values(4),
    }
    after = tuned(before) | {name: before[name] for name in ("head.weight", "head.bias", "h.0.proj.bias")}
    base, other = write_base(tmp_path / "base", before), write_base(tmp_path / "tuned", after)
    found = extract(base, other, tmp_path / "out", r=6)
    assert found.layers.keys() == {"h.0.fc", "h.0.proj"}
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["fan_in_fan_out"] is True
    merge_files(base, tmp_path / "out", tmp_path / "merged")
    for name in ("h.0.fc.weight", "h.0.proj.weight"):
        torch.testing.assert_close(everything_in(tmp_path / "merged")[name], tuned(before)[name])


def test_targets(tmp_path):
    base, other = write_base(tmp_path / "base", base_tensors()), write_base(tmp_path / "tuned", tuned(base_tensors()))
    found = extract(base, other, tmp_path / "out", r=2, targets=["q_proj", "layers.1.mlp.*"])
    assert found.layers.keys() == {
        Q,
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert found.not_covered["model.layers.0.mlp.up_proj.weight"] == "not chosen"
    with pytest.raises(ValueError, match=r"`targets` has 'k_proj', which matches no layer\. The nearest are .*q_proj"):
        extract(base, other, tmp_path / "out2", targets=["k_proj"])


def test_half_precision_and_other_shapes(tmp_path):
    before, after = base_tensors(torch.bfloat16), tuned(base_tensors(torch.bfloat16))
    after["lm_head.weight"], after["new.weight"] = values(21, 8), values(2, 2)
    del after["model.layers.1.mlp.up_proj.weight"]
    base, other = write_base(tmp_path / "base", before), write_base(tmp_path / "tuned", after)
    found = extract(base, other, tmp_path / "out", r=8)
    assert found.not_covered["lm_head.weight"] == "(20, 8) became (21, 8)"
    assert found.not_covered["new.weight"] == "not in the base"
    assert found.not_covered["model.layers.1.mlp.up_proj.weight"] == "not in the fine-tuned model"
    assert found.energy() == pytest.approx(1)


def test_refused(tmp_path):
    base, same = write_base(tmp_path / "base", base_tensors()), write_base(tmp_path / "same", base_tensors(), 2)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="no chosen layer that differs"):
        extract(base, same, tmp_path / "out")
    with pytest.raises(ValueError, match="`r` must be at least 1"):
        extract(base, same, tmp_path / "out", r=0)
    bad = tuned(base_tensors())
    bad[f"{Q}.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"`{Q}.weight` has NaN"):
        extract(base, write_base(tmp_path / "bad", bad), tmp_path / "out")
    assert [name for name in listing(tmp_path) if not name.startswith("bad")] == before


def test_it_loads_in_peft(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter += 0.1 * values(*parameter.shape)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", r=32)
    loaded = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out"
    )
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
