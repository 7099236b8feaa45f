"""Directories of several adapters, with peft as the oracle: each adapter in the directory of its name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    combine_adapters,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    use_adapters,
)
from lightning_lora.model.several.strengths import set_strengths, strengths_of
from tests.helpers.models import FusedBlocks, net
from tests.helpers.oracles import assert_same_values, same_bits, snapshot
from tests.helpers.several import (
    THREE,
    fill,
    opened_by_peft,
    outputs,
    outputs_in_peft,
    with_adapters,
    written_by_peft,
)

pytest.importorskip("peft")
X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)
FILES = {"adapter_config.json", "adapter_model.safetensors"}
BY_PEFT = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]},
    "b": {"r": 5, "lora_alpha": 2, "use_rslora": True, "target_modules": ["v", "mlp"], "rank_pattern": {"mlp": 3}},
    "c": {"r": 1, "lora_alpha": 1, "target_modules": ["head"]},
}


def files_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def each_alone(model, x=X):
    """The outputs with each adapter alone."""
    every = {}
    for name in dict.fromkeys(key.split(".lora.")[1].split(".")[0] for key, _ in lora_parameters(model)):
        with use_adapters(model, name):
            every[name] = outputs(model, x)
    return every


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def fused():
    return seeded(lambda: FusedBlocks(16))


@pytest.mark.parametrize("first", THREE)
def test_peft_opens_each_directory(tmp_path, first):
    """Each by `from_pretrained`, and the others beside it by `load_adapter`."""
    model = with_adapters(net())
    save_adapter(model, tmp_path)
    assert files_in(tmp_path) == {f"{name}/{file}" for name in THREE for file in FILES}
    order = [first, *(name for name in THREE if name != first)]
    theirs, expected = opened_by_peft(net(), {name: tmp_path / name for name in order}), each_alone(model)
    assert expected.keys() == THREE.keys()
    assert all(close(outputs_in_peft(theirs, name, X), expected[name]) for name in THREE)


def test_slices_of_fused_layers_and_what_trains_in_addition(tmp_path):
    """What trains in addition acts with every adapter, so each directory has it."""
    base = net()
    model = with_adapters(copy.deepcopy(base), {"fr": {**THREE["fr"], "also_train": ["head"]}, "de": THREE["de"]})
    model.head.weight.data += 0.5
    expected = each_alone(model)
    save_adapter(model, tmp_path)
    for name in ("fr", "de"):
        assert close(outputs_in_peft(opened_by_peft(base, {name: tmp_path / name}), name, X), expected[name])
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert all(torch.equal(y, expected[name]) for name, y in each_alone(loaded).items())


@pytest.mark.slow
def test_one_goes_into_the_directory_itself_and_never_another(tmp_path):
    model = with_adapters(net())
    for name in THREE:
        save_adapter(model, tmp_path / name, name=name)
        assert files_in(tmp_path / name) == FILES
        with safe_open(tmp_path / name / "adapter_model.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["lightning_lora.config"])["name"] == name
    expected = each_alone(model)
    theirs = opened_by_peft(net(), {name: tmp_path / name for name in THREE})
    assert all(close(outputs_in_peft(theirs, name, X), expected[name]) for name in THREE)
    remove_lora(model, name="fr")
    remove_lora(model, name="de")
    save_adapter(model, tmp_path / "last")
    assert files_in(tmp_path / "last") == FILES
    again = net()
    load_adapter(again, tmp_path / "last", name="es")
    assert torch.equal(each_alone(again)["es"], expected["es"])


def test_merged_adapters_and_resting_ones_are_written(tmp_path):
    model = with_adapters(net())
    expected = each_alone(model)
    merge_lora(model, {"fr": 0.5})
    save_adapter(model, tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert all(torch.equal(y, expected[name]) for name, y in each_alone(loaded).items())


def test_a_failed_save_leaves_every_old_file(tmp_path, monkeypatch):
    model = with_adapters(net())
    save_adapter(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fill(model, seed=1)
    next(p for key, p in lora_parameters(model) if ".es." in key).data[0, 0] = float("nan")  # the last one that is read
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_adapter(model, tmp_path)
    fill(model, seed=1)
    replace, calls = Path.replace, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_three_adapters_of_peft_load_side_by_side(tmp_path):
    places = written_by_peft(net(), tmp_path, BY_PEFT)
    theirs = opened_by_peft(net(), places)
    model = net()
    for name, place in places.items():
        assert load_adapter(model, place, name=name) == [
            key.partition(".lora.")[0] for key in lora_state_dict(model, name) if key.endswith(".A")
        ]
    with use_adapters(model, None):
        assert torch.equal(outputs(model, X), outputs(net(), X))
    ours = each_alone(model)
    assert ours.keys() == BY_PEFT.keys() and all(close(outputs_in_peft(theirs, n, X), y) for n, y in ours.items())
    together = net()  # by the directory that holds all of them
    load_adapter(together, tmp_path)
    assert all(torch.equal(y, ours[name]) for name, y in each_alone(together).items())
    one = net()
    load_adapter(one, tmp_path, name="b")
    assert list(each_alone(one)) == ["b"] and torch.equal(outputs(one, X), ours["b"])


def test_an_adapter_that_is_there_gets_the_values_and_the_others_stay(tmp_path):
    model = with_adapters(net())
    before = snapshot(model)
    save_adapter(model, tmp_path)
    fill(model, seed=1)
    changed = snapshot(model)
    load_adapter(model, tmp_path, name="de")
    for key, value in model.state_dict().items():
        assert same_bits(value, (before if ".lora.de." in key else changed)[key]), key
    load_adapter(model, tmp_path)
    assert_same_values(model, before)


def test_no_name_is_default_or_the_only_adapter(tmp_path):
    (place,) = written_by_peft(net(), tmp_path, {"a": BY_PEFT["a"]}).values()
    bare = net()
    load_adapter(bare, place)
    assert list(each_alone(bare)) == ["default"]
    load_adapter(bare, place, name="other")
    load_adapter(bare, place)  # "default" gets the values
    assert list(each_alone(bare)) == ["default", "other"]
    only = net()
    apply_lora(only, LoRAConfig(r=2, alpha=6, targets=["q", "v"], name="mine"))
    load_adapter(only, place)
    assert list(each_alone(only)) == ["mine"] and torch.equal(outputs(only, X), each_alone(bare)["other"])


def test_all_of_a_directory_or_nothing(tmp_path):
    """The second file does not fit, so the first is not loaded."""
    written_by_peft(net(), tmp_path, BY_PEFT)
    (tmp_path / "c" / "adapter_model.safetensors").write_bytes(b"")
    model = net()
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    assert_same_values(model, before)
    assert [type(module) for module in model.modules()] == classes


def test_fused_layers(tmp_path):
    """One adapter in slices, one on the whole layer."""
    model = fused()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "qkv" in name]
    with_adapters(model, {"fr": {"r": 2, "targets": "qv"}, "de": {"r": 3, "alpha": 5, "targets": names}})
    x = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16)
    expected = each_alone(model, x)
    save_adapter(model, tmp_path)
    theirs = opened_by_peft(fused(), {name: tmp_path / name for name in ("fr", "de")})
    assert all(close(outputs_in_peft(theirs, name, x), y) for name, y in expected.items())


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def embedding():
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.Linear(6, 3))


def convolutions():
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 2, 3, stride=2))


INDEX = torch.tensor([[1, 5, 0, 3], [2, 2, 6, 4]])
TRANSPOSED = {"fan_in_fan_out": True}
KINDS = {
    "gpt2": (
        gpt2,
        INDEX,
        {
            "a": {"r": 2, "target_modules": ["c_attn"], **TRANSPOSED},
            "b": {"r": 3, "lora_alpha": 9, "target_modules": ["c_fc", "c_attn"], "use_rslora": True, **TRANSPOSED},
            "c": {"r": 1, "target_modules": ["wpe"]},
        },
    ),
    "embedding": (
        embedding,
        INDEX,
        {"a": {"r": 2, "target_modules": ["0", "2"]}, "b": {"r": 3, "lora_alpha": 5, "target_modules": ["0", "1"]}},
    ),
    "convolutions": (
        convolutions,
        torch.linspace(-1, 1, 2 * 2 * 8).reshape(2, 2, 8),
        {"a": {"r": 2, "target_modules": ["0"]}, "b": {"r": 3, "lora_alpha": 5, "target_modules": ["0", "2"]}},
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(tmp_path, kind):
    """From peft side by side, back to peft, and into a slot that is larger."""
    make, x, configs = KINDS[kind]
    base = seeded(make)
    theirs = opened_by_peft(base, written_by_peft(base, tmp_path / "peft", configs))
    model, slot = copy.deepcopy(base), copy.deepcopy(base)
    load_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    back = opened_by_peft(base, {name: tmp_path / "ours" / name for name in configs})
    layers = sorted({key.partition(".lora.")[0] for key, _ in lora_parameters(model)})
    apply_lora(slot, LoRAConfig(r=4, alpha=2, targets=layers, name="slot"))
    for name, y in each_alone(model, x).items():
        load_adapter(slot, tmp_path / "peft" / name, into="slot")
        assert all(close(outputs_in_peft(each, name, x), y) for each in (theirs, back))
        assert close(outputs(slot, x), y) and not close(outputs(copy.deepcopy(base), x), y)


@pytest.mark.parametrize("others", [[], ["de"]])
def test_a_network_under_two_names(tmp_path, others):
    """The file has its layers once."""

    def make():
        network = net()
        return nn.ModuleDict({"first": network, "second": network})

    model, loaded = make(), make()
    with_adapters(model, {"fr": THREE["fr"]})
    save_adapter(model, tmp_path)
    with_adapters(loaded, {name: THREE[name] for name in others})
    load_adapter(loaded, tmp_path, name="fr")
    for key, value in lora_state_dict(model, "fr").items():
        assert same_bits(loaded.state_dict()[key], value), key


@pytest.mark.slow
def test_several_act_as_strongly_as_when_they_were_saved(tmp_path):
    model = with_adapters(net())
    combine_adapters(model, {"fr": 0.5, "de": -0.5}, "mix")
    set_strengths(model, {"es": 0.25})
    expected = strengths_of(model)
    save_adapter(model, tmp_path / "live")
    loaded = net()
    load_adapter(loaded, tmp_path / "live")
    assert strengths_of(loaded) == expected == {"fr": 0.0, "de": 0.0, "es": 0.25, "mix": 1.0}
    assert close(outputs(loaded, X), outputs(model, X))
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    again = net()
    load_adapter(again, tmp_path / "merged")
    assert strengths_of(again) == expected
    one = net()
    load_adapter(one, tmp_path / "live" / "fr", name="fr")
    assert strengths_of(one) == {"fr": 1.0}, "alone it acts"


def test_resting_adapters_act_where_those_that_acted_are_not_loaded(tmp_path):
    model = with_adapters(net())
    combine_adapters(model, {"fr": 0.5, "de": 0.5, "es": 1.0}, "mix")
    save_adapter(model, tmp_path)
    shutil.rmtree(tmp_path / "mix")
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert strengths_of(loaded) == dict.fromkeys(THREE, 1.0)


def test_a_strength_that_is_no_number_is_an_error_before_anything_is_loaded(tmp_path):
    model = with_adapters(net())
    save_adapter(model, tmp_path)
    path = tmp_path / "de" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path), path, {**about, "lightning_lora.strength": "nan"})
    bare = net()
    with pytest.raises(ValueError, match="header of the adapter's file is damaged: its strength is `nan`"):
        load_adapter(bare, tmp_path)
    assert not list(lora_parameters(bare))
