"""peft's Auto classes load a directory with its base: the outputs are those of the model that was saved."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
import transformers

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from tests.helpers.oracles import train_by_hand

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 5, 3, 3], [2, 2, 6, 4]])
SMALL = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"vocab_size": 11, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.|transformers\.")
        yield
    logging.disable(logging.NOTSET)


def llama(cls, **arguments):
    return cls(transformers.LlamaConfig(**SMALL, pad_token_id=0, **arguments))


class Own(transformers.LlamaForCausalLM):
    """A user's own sub-class."""


TEXT = {"input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
CASES = {
    "causal": (lambda: llama(transformers.LlamaForCausalLM), "CausalLM", TEXT, "CAUSAL_LM"),
    "own-class": (lambda: llama(Own), "CausalLM", TEXT, "CAUSAL_LM"),
    "text-to-text": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
        "Seq2SeqLM",
        {**TEXT, "labels": IDS},
        "SEQ_2_SEQ_LM",
    ),
    "classes": (lambda: llama(transformers.LlamaForSequenceClassification), "SequenceClassification", TEXT, "SEQ_CLS"),
    "tokens": (lambda: llama(transformers.LlamaForTokenClassification), "TokenClassification", TEXT, "TOKEN_CLS"),
    "answers": (lambda: llama(transformers.LlamaForQuestionAnswering), "QuestionAnswering", TEXT, "QUESTION_ANS"),
    "frozen-head": (lambda: llama(transformers.LlamaForSequenceClassification), "", TEXT, None),
    "adapted-head": (lambda: llama(transformers.LlamaForSequenceClassification), "", TEXT, None),
    "backbone": (lambda: llama(transformers.LlamaModel), "", TEXT, None),
    "images": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES, image_size=8, patch_size=4)),
        "",
        PIXELS,
        None,
    ),
}


HEADS = {"classes": ["score"], "tokens": ["score"], "answers": ["qa_outputs"]}


@torch.no_grad()
def out(model, inputs):
    return model.eval()(**inputs)[1 if "labels" in inputs else 0]


@pytest.fixture
def trained(request, tmp_path):
    """A base on the disk and loaded from there, adapted and trained."""
    make, auto, inputs, task = CASES[request.param]
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    targets = ["score", "q_proj"] if request.param == "adapted-head" else "attn"
    apply_lora(model, LoRAConfig(r=2, targets=targets, also_train=HEADS.get(request.param)))
    train_by_hand(model)
    return model, getattr(peft, f"AutoPeftModel{'For' if auto else ''}{auto}"), inputs, task


@pytest.mark.slow
@pytest.mark.parametrize("trained", CASES, indirect=True)
def test_peft_s_auto_class_finds_the_base(trained, tmp_path):
    model, auto, inputs, task = trained
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task
    torch.testing.assert_close(out(auto.from_pretrained(tmp_path / "adapter"), inputs), out(model, inputs))
    load_adapter(bare := type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(out(bare, inputs), out(model, inputs))
