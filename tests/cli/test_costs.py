"""Bytes with LoRA and without: the numbers that the method's own paper reports, from configurations alone."""

from __future__ import annotations

import functools

import pytest

from lightning_lora.cli.costs import ACCOUNTINGS, Costs
from lightning_lora.cli.plan import plan_files

transformers = pytest.importorskip("transformers")
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
MODELS = {
    "gpt3": transformers.GPT2Config(**GPT3, tie_word_embeddings=False, architectures=["GPT2LMHeadModel"]),
    "llama": transformers.LlamaConfig(**LLAMA, vocab_size=32000, architectures=["LlamaForCausalLM"]),
}
BY_NAME = {how.name: how for how in ACCOUNTINGS}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configurations")

    @functools.cache  # GPT-3 takes three seconds to build, even without values
    def costs(model, r):
        path = folder / f"{model}.json"
        path.write_text(MODELS[model].to_json_string())
        return plan_files(path, r, "qv").costs

    return costs


@pytest.mark.slow
@pytest.mark.parametrize(("r", "millions"), [(1, 4.7), (8, 37.7)])
def test_gpt3_on_queries_and_values(planned, r, millions):
    assert round(planned("gpt3", r).trainable / 1e6, 1) == millions


@pytest.mark.slow
def test_gpt3_parameters(planned):
    assert planned("gpt3", 1).base / 1e6 == pytest.approx(175_255.8, rel=3e-4)


@pytest.mark.slow
def test_gpt3_checkpoint(planned):
    full, adapter = planned("gpt3", 4).checkpoint(2)
    assert adapter == 2 * 96 * 2 * 4 * (12288 + 12288) == 36 * 2**20, "36.0 MiB; the paper says 35 MB"
    assert full / 1e9 == pytest.approx(350, rel=0.002)
    assert full / adapter == pytest.approx(10_000, rel=0.08)


@pytest.mark.slow
def test_gpt3_training(planned):
    costs = planned("gpt3", 4)
    freed, held = (costs.memory(BY_NAME[f"16-bit, gradients {name}"]) for name in ("freed as used", "held"))
    assert freed[1] == held[1] == pytest.approx(350e9, rel=0.003)
    assert freed[0] == pytest.approx(1.05e12, rel=0.003) and held[0] == pytest.approx(1.40e12, rel=0.003)
    assert freed[0] < 1.2e12 < held[0], "the paper's number"
    assert 1 - freed[1] / freed[0] == pytest.approx(2 / 3, abs=0.001), "the paper: memory is reduced by up to 2/3"


def test_llama_7b(planned):
    costs = planned("llama", 8)
    assert costs.base == 6_738_415_616
    assert costs.checkpoint(2)[1] == 8 * 2**20, "8 MB"


def test_a_small_update():
    shapes = 100 * 5 + 5 * 500
    assert Costs(100 * 500, shapes) == Costs(50_000, 3_000)


def test_bytes_for_each_parameter():
    assert [(how.weight, how.trained) for how in ACCOUNTINGS] == [(2, 6), (2, 8), (2, 16), (4, 16)]
    assert Costs(100, 3).memory(BY_NAME["fp32"]) == (1600, 400 + 48)
    assert Costs(100, 3).checkpoint(4) == (400, 12)
