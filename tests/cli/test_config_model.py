"""Plans from a config.json, against the real class built small; and configurations that nobody should trust."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from lightning_lora import LoRAConfig, plan_lora
from lightning_lora.cli import config_model
from lightning_lora.cli.config_model import model_of
from lightning_lora.cli.plan import plan_files
from tests.helpers.selection import slow_except

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 600,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 600}
MODELS = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED | {"head_dim": 8},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED | {"head_dim": 32},
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "FalconForCausalLM": FALCON,
    "T5ForConditionalGeneration": T5,
    "GPTNeoXForCausalLM": SMALL,
    "CohereForCausalLM": GROUPED,
    "PhiForCausalLM": SMALL,
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "BertModel": SMALL,
    "ViTForImageClassification": {key: value for key, value in SMALL.items() if key != "vocab_size"},
}


def written(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


FAST = ["LlamaForCausalLM", "FalconForCausalLM", "T5ForConditionalGeneration"]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(FAST, MODELS))
def test_the_numbers_are_those_of_the_model(name, tmp_path):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**MODELS[name]))  # on the CPU, with values
    model.config.architectures = [name]
    path = written(tmp_path, **json.loads(model.config.to_json_string()))
    for targets in ("attn", "qv", "all"):
        try:
            expected = plan_lora(model, LoRAConfig(r=4, targets=targets), compute="auto")
        except ValueError as error:
            with pytest.raises(ValueError, match=r"found|matches"):
                plan_files(path, 4, targets)
            assert str(error)
            continue
        planned = plan_files(path, 4, targets)
        assert (planned.plan, planned.model) == (expected, name), targets
        assert planned.costs.base == sum(parameter.numel() for parameter in model.parameters())


def test_without_architectures_the_bare_model(tmp_path):
    path = written(tmp_path, model_type="llama", **GROUPED)
    assert type(model_of(path)) is transformers.LlamaModel
    assert plan_files(tmp_path).model == "LlamaModel"


def test_nothing_is_allocated_and_the_random_stream_stays(tmp_path):
    before = torch.get_rng_state()
    model = model_of(written(tmp_path, model_type="llama", hidden_size=2**15, num_hidden_layers=1, vocab_size=2**20))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


BAD = {
    "no-type": (SMALL, "has the `model_type` `None`, which transformers .* does not know"),
    "unknown": ({"model_type": "some_day"}, "has the `model_type` `some_day`"),
    "type-that-is-no-name": ({"model_type": ["llama"]}, "has the `model_type` "),
    "remote-code": ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}, "code that comes with a model is"),
    "remote-class": ({"model_type": "llama", "architectures": ["Mine"]}, "has `Mine` in `architectures`, which trans"),
    "no-model": ({"model_type": "llama", "architectures": ["AutoConfig"]}, "has `AutoConfig` in `architectures`"),
    "other-model": (
        {"model_type": "llama", "architectures": ["BertModel"]},
        "`BertModel` in `architectures`, wh",
    ),
    "text": ({"model_type": "llama", "hidden_size": "8"}, "describes no model that can be built"),
    "negative": ({"model_type": "gpt2", "n_embd": -8}, "describes no model that can be built"),
    "layers": ({"model_type": "llama", "num_hidden_layers": 10**9}, "has 1,000,000,000 as `num_hidden_layers`"),
    "layers-inside": ({"model_type": "llava", "text_config": {"n_layer": 10**9}}, "1,000,000,000 as `n_layer`"),
    "depths": ({"model_type": "swin", "depths": [2, 10**9]}, "has 1,000,000,000 as `depths`"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 10**7}, "has 10,000,000 as `num_local_experts`"),
    "labels": ({"model_type": "llama", "num_labels": 10**9}, "as `num_labels`: no model has more than 1,000,000"),
    "width": ({"model_type": "llama", "hidden_size": 2**62}, "as `hidden_size`: no model has more than"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case, tmp_path):
    values, words = BAD[case]
    with pytest.raises(ValueError, match=words) as raised:
        model_of(written(tmp_path, **values))
    assert len(str(raised.value)) < 1000


def test_the_number_of_modules_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(config_model, "MOST_MODULES", 50)
    with pytest.raises(ValueError, match="describes a model of more than 50 modules"):
        model_of(written(tmp_path, model_type="llama", num_hidden_layers=9_000, hidden_size=32))
    torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(60)])  # only while a configuration is built


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no timer")
def test_the_time_is_bounded(tmp_path, monkeypatch):
    def endless(path):
        while True:
            time.thread_time()

    monkeypatch.setattr(config_model, "SECONDS", 0.2)
    monkeypatch.setattr(config_model, "_config", lambda values, path, transformers: endless(path))
    with pytest.raises(ValueError, match=r"takes more than 0\.2 seconds to build"):
        model_of(written(tmp_path, model_type="llama"))


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match='pip install "transformers>=5"'):
        model_of(written(tmp_path, model_type="llama"))
