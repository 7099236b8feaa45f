"""Tied weights, told from configurations and names."""

from __future__ import annotations

import pytest

from lightning_lora.cli.base_match import why_tied
from lightning_lora.files.weights import open_weights
from tests.helpers.on_disk import base_tensors, write_base

LANGUAGE = {"architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, False, True),
        (LANGUAGE, False, True),
        (LANGUAGE, True, False),
        ({"architectures": ["BertModel"]}, False, False),
        ({}, False, False),
        ({"architectures": None, "text_config": None}, False, False),
    ],
)
def test_when(tmp_path, config, head, tied):
    tensors = {name: value for name, value in base_tensors().items() if head or name != "lm_head.weight"}
    base = open_weights(write_base(tmp_path / "base", tensors, config=config))
    for name in ("lm_head", "model.embed_tokens"):
        assert (why_tied(name, base) is not None) == tied
    assert why_tied("model.layers.0.self_attn.q_proj", base) is None


def test_small_embeddings_are_not_the_head_s(tmp_path):
    tensors = base_tensors() | {"model.token_type_embeddings.weight": base_tensors()["model.norm.weight"].view(1, 8)}
    base = open_weights(write_base(tmp_path / "base", tensors, config={"tie_word_embeddings": True}))
    assert why_tied("model.token_type_embeddings", base) is None
