"""A and B of models, PEFT directories and state dicts, and which layers of two sides are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    save_adapter,
)
from lightning_lora.analysis.sources import factors_of, matrices_of, same_layers
from tests.helpers.dense_updates import two_layers
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.oracles import SCALE


def products(factors):
    return {name: B @ A for name, (B, A) in factors.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name]) for name in first)


def test_a_model_its_directory_and_its_file(tmp_path):
    model = two_layers()
    live = products(factors_of(model))
    save_adapter(model, tmp_path / "adapter")
    assert same(live, products(factors_of(tmp_path / "adapter")))
    assert same(live, products(factors_of(str(tmp_path / "adapter" / "adapter_model.safetensors"))))
    merge_lora(model)
    assert same(live, products(factors_of(model)))


def test_a_state_dict_has_no_scale():
    model = two_layers()
    live, state = products(factors_of(model)), lora_state_dict(model)
    assert same(live, {name: SCALE * product for name, product in products(matrices_of(state)).items()})
    with pytest.raises(TypeError, match=r"Expected a module .*, but got a dict. A state dict has no scale: load it"):
        factors_of(state)
    other = two_layers(seed=4)
    load_lora_state_dict(other, state)
    assert same(live, products(factors_of(other)))
    with pytest.raises(TypeError, match="but got a int"):
        factors_of(3)


def test_state_dicts_that_hold_no_pairs():
    state = lora_state_dict(two_layers())
    with pytest.raises(ValueError, match="The state dict has no LoRA adapters"):
        matrices_of({"0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="`name` must be an adapter of The state dict, which has 'default'"):
        matrices_of(state, "fr")
    del state["1.lora.default.B"]
    with pytest.raises(ValueError, match="has only A of `1`, and a pair is A and B"):
        matrices_of(state)


@pytest.mark.slow
def test_a_checkpoint_by_its_state_dict_or_its_module(tmp_path):
    module, files = Lit(), checkpoints(tmp_path)
    trainer(LoRACallback(r=2, merge=False), files, max_epochs=1).fit(module, data(), data(1))
    path = files.last_model_path
    with pytest.raises(ValueError, match=r"is no PEFT directory. Load a checkpoint of a run by load_from_checkpoint"):
        factors_of(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert same(products(matrices_of(state)), products(factors_of(module)))
    assert same(products(matrices_of(state)), products(factors_of(load_from_checkpoint(Lit, path))))


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        factors_of(tmp_path / "none")


NAMES = ["net.a.q", "net.a.v", "net.b.q"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (NAMES, NAMES[1:], [(name, name) for name in NAMES[1:]]),
        (NAMES, ["a.q", "b.q"], [("net.a.q", "a.q"), ("net.b.q", "b.q")]),
        (["a.q", "a.v", "c.q"], NAMES, [("a.q", "net.a.q"), ("a.v", "net.a.v")]),
        (["0"], ["model.0"], [("0", "model.0")]),
    ],
)
def test_layers_of_two_sides(first, second, expected):
    assert same_layers(first, second) == expected


def test_no_layer_on_both_sides():
    with pytest.raises(
        ValueError, match=r"The first has `a\.q`; the second has `b\.k`, `b\.v`\. An nn\.Multi.* load that"
    ):
        same_layers(["a.q"], ["b.k", "b.v"])


def test_an_attention_is_compared_through_a_model(tmp_path):
    def attention():
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})

    model, other = attention(), attention()
    other.load_state_dict(model.state_dict())
    apply_lora(model, LoRAConfig(r=2, targets=["attn"]))
    with pytest.warns(UserWarning, match="adds the update of `attn.out_proj` twice"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"An nn\.MultiheadAttention has other pairs in a PEFT directory"):
        same_layers(factors_of(nn.Sequential(model)), factors_of(two_layers()))
    load_adapter(other, tmp_path / "a")
    assert same(products(factors_of(model)), products(factors_of(other)))
