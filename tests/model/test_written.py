"""Frozen parameters that other code writes are in every file of the adapter, and their values are not compared."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    unmerge_lora,
)
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.written import renormalized, set_written, written_parameters


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    apply_lora(made, LoRAConfig(r=2, targets=["0"]))
    return made


def test_they_are_in_the_state_and_load_again():
    one, other = model(), model()
    assert set_written(one, ["1.weight", "2.bias"]) and not set_written(one, {"2.bias", "1.weight"})
    assert [name for name, _ in written_parameters(one)] == ["1.weight", "2.bias"]
    one[1].weight.data.add_(1)
    state = lora_state_dict(one)
    assert set(state) == {"0.lora.default.A", "0.lora.default.B", "1.weight", "2.bias"}
    with pytest.raises(ValueError, match=r"it has `1.weight`, which is frozen"):
        load_lora_state_dict(other, state)
    set_written(other, ["1.weight", "2.bias"])
    load_lora_state_dict(other, state)
    assert torch.equal(other[1].weight, one[1].weight)


def test_they_stay_frozen_and_known_through_merge_and_copy():
    made = model()
    set_written(made, ["1.weight"])
    assert not made[1].weight.requires_grad
    merge_lora(made)
    unmerge_lora(made)
    assert [name for name, _ in written_parameters(copy.deepcopy(made))] == ["1.weight"]


def test_the_fingerprint_has_their_shape_alone():
    made = model()
    set_written(made, ["1.weight"])
    assert fingerprint(made)["1.weight"] == [None, None, None, 4, 4]
    assert set_written(made, [])
    assert fingerprint(made) == fingerprint(model())


def test_embeddings_that_scale_themselves_down_are_compared_by_shape():
    made = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2), nn.EmbeddingBag(3, 2, max_norm=1.0))
    assert renormalized(made) == {id(made[0].weight), id(made[2].weight)}
    sums = fingerprint(made)
    assert sums["0.weight"] == sums["2.weight"] == [None, None, None, 3, 2] and None not in sums["1.weight"]


def test_the_state_of_a_merged_model_has_the_base_of_what_is_adapted_and_written():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter)
    set_written(model, ["1.weight", "1.bias"])
    live = {key: value.clone() for key, value in lora_state_dict(model).items()}
    merge_lora(model)
    state = lora_state_dict(model)
    assert state.keys() == live.keys() and all(torch.equal(state[key], live[key]) for key in live)
    assert torch.equal(state["1.weight"], base[1].weight) and not torch.equal(model[1].weight, base[1].weight)
