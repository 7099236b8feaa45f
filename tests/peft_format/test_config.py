"""``adapter_config.json``: read as peft reads it, written as small as it can be; what is not plain LoRA by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from lightning_lora.peft_format.config import IGNORED, READ, REFUSED, read_config
from lightning_lora.peft_format.config_writer import Scaled, written_config
from lightning_lora.peft_format.targets import exact_targets, inner_name, saved, targeted

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"]}


class Model(nn.Module):
    """Names that are tails, parts and look-alikes of one another."""

    def __init__(self):
        super().__init__()
        self.q, self.qq, self.a_q = (nn.Linear(2, 2) for _ in range(3))
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "mlp": self.mlp()}) for _ in range(3))
        self.head = nn.Linear(2, 2)

    @staticmethod
    def mlp():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})


NAMES = [name for name, _ in Model().named_modules() if name]


def asked(**values):
    return read_config({**PLAIN, **values})


MEANT = [
    {"target_modules": ["q"]},
    {"target_modules": ["layers.1.q", "a_q"]},
    {"target_modules": ["0", "head"]},
    {"target_modules": r"(layers\.[02]\.)?q"},
    {"target_modules": "q"},
    {"target_modules": ["q", "0"], "exclude_modules": ["1.q", "layers.0"]},
    {"target_modules": ["q"], "exclude_modules": r"layers\..*"},
    {"target_modules": ["q"], "modules_to_save": ["layers.1"]},
    {"target_modules": ["q"], "modules_to_save": ["l.yers"]},
    {"target_modules": ["0", "1"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["0", "q"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["0"], "layers_to_transform": [0]},
    {"target_modules": ["q"], "layers_to_transform": []},
]


@pytest.mark.parametrize("values", MEANT)
def test_targets_are_those_that_peft_means(values):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**values)
    assert targeted(asked(**values), Model()) == [name for name in NAMES if check_target_module_exists(config, name)]


@pytest.mark.parametrize("name", ["q", "layers.0.q", "layers.2.mlp.experts.1", "head"])
def test_the_first_pattern_counts(name):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    ranks = {"layers.0.q": 3, "q|head": 5, r"mlp\.experts\.\d": 7, "1": 9}
    alphas = {"^q": 1.5, "experts.*": 2.5, "d": 8.0}
    config = asked(rank_pattern=ranks, alpha_pattern=alphas)
    assert config.rank_for(name) == ranks.get(get_pattern_key(ranks, name), 4)
    assert config.alpha_for(name) == alphas.get(get_pattern_key(alphas, name), 6)
    assert config.scale_for(name) == config.alpha_for(name) / config.rank_for(name)
    rooted = asked(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
    assert rooted.scale_for(name) == config.alpha_for(name) / config.rank_for(name) ** 0.5


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "GPT2LMHeadModel", "GPT2Model"])
def test_all_linear_leaves_out_the_head_that_peft_leaves_out(kind, task):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    size = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    model = getattr(transformers, kind)(size)
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    expected = _maybe_include_all_linear_layers(config, model).target_modules
    assert set(targeted(asked(target_modules="ALL-linear", task_type=task), model)) == expected


def test_modules_to_save_are_ends_of_names():
    assert saved(["q"], Model()) == ["q", "qq", "a_q", "layers.0.q", "layers.1.q", "layers.2.q"]


WRONG = [
    ({"peft_type": "LOHA"}, r"`peft_type` in `adapter_config.json` must be 'LORA'.*but got `LOHA`"),
    ({"peft_type": None}, r"`peft_type` .* but got `None`"),
    ({"use_dora": True}, r"has `use_dora`, which is not plain LoRA: DoRA scales"),
    ({"lora_bias": True}, r"has `lora_bias`"),
    ({"megatron_config": {"a": 1}}, r"has `megatron_config`"),
    ({"trainable_token_indices": [1]}, r"has `trainable_token_indices`"),
    ({"target_parameters": ["experts.gate"]}, r"has `target_parameters`"),
    ({"alora_invocation_tokens": [1, 2]}, r"has `alora_invocation_tokens`"),
    ({"layer_replication": [[0, 2]]}, r"has `layer_replication`"),
    ({"use_qalora": True}, r"has `use_qalora`: `True`, which may mean another method"),
    ({"some_day": {"a": 1}}, r"has `some_day`: `\{'a': 1\}`, which may mean another method"),
    ({"init_lora_weights": "pissa_niter_4"}, r"`init_lora_weights` `pissa_niter_4`, which changed the base's weights"),
    ({"init_lora_weights": "olora"}, r"path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "mica"}, r"`init_lora_weights` .* must be one of True, False, 'gaussian'.*`mica`"),
    ({"r": 0}, r"`r` in `adapter_config.json` must be a positive integer, but got `0`"),
    ({"r": True}, r"`r` .* but got `True`"),
    ({"r": 4.0}, r"`r` .* but got `4.0`"),
    ({"r": "4"}, r"`r` .* but got `4`"),
    ({"lora_alpha": -1}, r"`lora_alpha` .* must be a positive number, but got `-1`"),
    ({"lora_alpha": float("nan")}, r"`lora_alpha` .* but got `nan`"),
    ({"lora_alpha": [1]}, r"`lora_alpha` .* but got `\[1\]`"),
    ({"lora_dropout": 1.5}, r"`lora_dropout` .* must be a probability in \[0, 1\), but got `1.5`"),
    ({"target_modules": None}, r"`target_modules` .* must be module names or a regular expression, but got `None`"),
    ({"target_modules": []}, r"`target_modules` .* but got `\[\]`"),
    ({"target_modules": [1]}, r"`target_modules` .* must be a list of module names, but got `\[1\]`"),
    ({"target_modules": {"q": 1}}, r"`target_modules` .* must be a list of module names"),
    ({"target_modules": "q("}, r"`target_modules` .* must be a regular expression \(missing \), .* but got `q\(`"),
    ({"target_modules": "q", "layers_to_transform": 1}, r"`layers_to_transform` .* must be null where"),
    ({"exclude_modules": 3}, r"`exclude_modules` .* must be a list of module names"),
    ({"layers_to_transform": ["1"]}, r"`layers_to_transform` .* must be layer numbers, but got `\['1'\]`"),
    ({"layers_pattern": "("}, r"`layers_pattern` .* must be the name of a list of layers"),
    ({"target_modules": "(a+)+$"}, r"`target_modules` .* \(a repeat without a bound inside another"),
    ({"exclude_modules": r"(a)\1"}, r"`exclude_modules` .*back-references are not allowed"),
    ({"rank_pattern": {"a{99999999999}": 2}}, r"`rank_pattern` .*repetition number is too large"),
    ({"modules_to_save": ["(?:a*)*"]}, r"`modules_to_save` .*a repeat without a bound inside another"),
    ({"rank_pattern": [1]}, r"`rank_pattern` .* must be an object of numbers by module name"),
    ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` .* must be a positive integer"),
    ({"rank_pattern": {"(": 1}}, r"`rank_pattern` .* must be a regular expression"),
    ({"alpha_pattern": {"q": "x"}}, r"`alpha_pattern\['q'\]` .* must be a positive number"),
    ({"use_rslora": 1}, r"`use_rslora` .* must be true or false, but got `1`"),
    ({"modules_to_save": "head"}, r"`modules_to_save` .* must be a list of module names, but got `head`"),
    ({"modules_to_save": ["("]}, r"`modules_to_save` .* must be a regular expression"),
    ({"bias": "some"}, r"`bias` .* must be one of 'none', 'all', 'lora_only', but got `some`"),
    ({"bias": ["all"]}, r"`bias` .* but got `\['all'\]`"),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[next(reversed(values)) for values, _ in WRONG])
def test_what_is_wrong_or_no_plain_lora_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        asked(**values)


def test_every_field_of_peft_s_is_known_or_refused_when_it_is_set():
    peft = pytest.importorskip("peft")
    defaults = {field.name: getattr(peft.LoraConfig(), field.name) for field in dataclasses.fields(peft.LoraConfig)}
    assert not {*READ, *REFUSED, *IGNORED} - defaults.keys() - {"runtime_config"}
    written = peft.LoraConfig(r=4, target_modules=["q"], inference_mode=True).to_dict()
    values = json.loads(json.dumps({**written, "target_modules": ["q"]}))
    assert read_config(values).r == 4
    for name in defaults.keys() - READ - IGNORED:
        with pytest.raises(ValueError, match=name):
            read_config({**values, name: {"any": 1}})


def test_exact_targets():
    model = Model()
    assert exact_targets(["layers.1.q", "head"], model) == ["layers.1.q", "head"]
    assert exact_targets(["q", "head"], model) == "q|head"
    assert targeted(asked(target_modules="q|head"), model) == ["q", "head"]
    assert exact_targets(["q", "layers.0.q", "layers.1.q", "layers.2.q"], model)[0] == "q"


def test_the_commonest_rank_and_alpha_are_the_plain_ones():
    modules = {"a.b": Scaled(2, 4.0), "a.c": Scaled(3, 1.5), "d": Scaled(2, 4.0)}
    text = written_config(
        modules, ["a.b"], ["head"], LoRAConfig(rslora=True, dropout=0.1), base="some/base", transposed=True
    )
    assert json.loads(text) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "some/base",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": ["a.b"],
        "rank_pattern": {r"^a\.c": 3},
        "alpha_pattern": {r"^a\.c": 1.5},
        "use_rslora": True,
        "modules_to_save": ["head"],
        "fan_in_fan_out": True,
    }


def test_the_inner_model():
    class LightningModule(nn.Module):
        pass

    lit = LightningModule()
    lit.net, lit.other = Model(), nn.Linear(2, 2)
    assert inner_name(lit, None, lambda head: head in ("", "net")) == "net"
    assert inner_name(lit, None, lambda head: head == "") == ""
    assert inner_name(Model(), None, lambda head: True) == ""
    assert inner_name(lit, "net.layers.0", lambda head: False) == "net.layers.0"


def directory_for(model, tmp_path, **changes):
    """A saved adapter of ``model`` with another configuration written over its own."""
    apply_lora(model, LoRAConfig(r=2, targets=["re:q|head"]))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as peft writes it, without our header
    return tmp_path


def test_a_configuration_and_weights_that_do_not_belong_together(tmp_path):
    directory = directory_for(Model(), tmp_path, target_modules=["head"])
    with pytest.raises(ValueError, match=r"`q` is adapted by .*, but `target_modules` and `exclude_modules`"):
        load_adapter(Model(), directory)
    directory = directory_for(Model(), tmp_path, target_modules=["head", "q"])
    with pytest.raises(ValueError, match=r"`layers.0.q` is adapted by `adapter_config.json` only"):
        load_adapter(Model(), directory)
    directory = directory_for(Model(), tmp_path, r=10**15)
    with pytest.raises(ValueError, match=r"`head` has rank 2 in .* says 1000000000000000: the two files"):
        load_adapter(Model(), directory)


def test_tied_parameters_that_the_file_trains_apart(tmp_path):
    def tied():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = Model()
        model.qq.weight = model.head.weight
        return model

    model = tied()
    apply_lora(model, LoRAConfig(r=2, targets=["a_q"], also_train=["qq"]))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["qq", "head"]
    other = tied()
    load_adapter(other, tmp_path)
    assert other.qq.weight is other.head.weight and torch.equal(other.head.weight, model.head.weight)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.head.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"are one parameter in the model, and the file trains them apart: untie"):
        load_adapter(tied(), tmp_path)
