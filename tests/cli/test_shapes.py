"""Shapes from configurations, against the models that transformers builds from them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightning_lora import LoRAConfig, plan_lora
from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.shapes import Transformer, transformer_of

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 600,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama-biases": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attention_bias=True)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, head_dim=8)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=32)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_counted(kind):
    with torch.device("meta"):
        model = MODELS[kind]()
    found = transformer_of(json.loads(model.config.to_json_string(use_diff=False)))
    assert sum(map(math.prod, found.shapes().values())) == sum(p.numel() for p in model.parameters())
    for targets in ("attn", "mlp", "all"):
        if kind != "bert" or targets != "all":  # its pooler is none of the blocks'
            config = LoRAConfig(r=4, targets=targets)
            plans = plan_lora(model, config), plan_lora(skeleton(found.shapes()), config)
            assert len({sum(row.parameters for row in plan.rows) for plan in plans}) == 1, targets


def test_a_model_inside_another():
    text = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 10, "rms_norm_eps": 1e-6}
    assert transformer_of({"text_config": text, "vision_config": {}}) == transformer_of(text)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_hidden_layers": 1, "vocab_size": 2}, "none of 'hidden_size', 'n_embd'.* which is `hidden`"),
        ({"hidden_size": -8, "num_hidden_layers": 1, "vocab_size": 2}, "`hidden` must be a positive integer .* got -8"),
        (
            {"hidden_size": "8", "num_hidden_layers": 1, "vocab_size": 2},
            "`hidden` must be a positive integer .* got '8'",
        ),
        ({"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 2**60}, "`vocab` must be a positive integer below"),
        ({**SMALL, "num_local_experts": 8}, "mixture of experts.*give the safetensors file"),
    ],
)
def test_refused(config, match):
    with pytest.raises(ValueError, match=match):
        transformer_of(config)


def test_the_paper_s_count_of_gpt3():
    gpt3 = Transformer(hidden=12288, layers=96, heads=96, vocab=50257, positions=2048, biases="all", tied=False)
    assert sum(map(math.prod, gpt3.shapes().values())) == pytest.approx(175_255.8e6, rel=3e-4)
