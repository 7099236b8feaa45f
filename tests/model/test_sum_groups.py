"""Which layers are summed together, and which have no weight's side."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.base import adapted_layers
from lightning_lora.model import sum_groups
from lightning_lora.model.sum_groups import compute_on_activations

CONFIG = LoRAConfig(r=2, targets=["re:.*"])


def groups(model):
    return {name: summed.group for name, layer in adapted_layers(model) for summed in layer.lora.sums.values()}


def test_neighbours_of_one_dtype_are_a_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).bfloat16(), nn.Linear(3, 4), nn.Conv1d(4, 2, 3))
    apply_lora(model, CONFIG, compute="weights")
    found = groups(model)
    assert found["0"] is found["2"] is found["3"] is not found["1"]


def test_a_group_has_a_limit_of_bytes(monkeypatch):
    monkeypatch.setattr(sum_groups, "MAX_BYTES", 2 * 16 * 4)  # two of these weights
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    apply_lora(model, CONFIG, compute="weights")
    assert len(set(map(id, groups(model).values()))) == 3


@pytest.mark.parametrize(("compute", "has_groups"), [("auto", False), ("weights", True)])
def test_sums_that_take_too_much_memory_are_made_on_request_alone(compute, has_groups, monkeypatch):
    monkeypatch.setattr(sum_groups, "MAX_BYTES_OF_SUMS", 2 * 16 * 4)
    for count, fits in [(2, True), (3, False)]:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
        apply_lora(model, CONFIG, compute=compute)
        assert bool(groups(model)) == (fits or has_groups)


def test_a_weight_that_is_never_summed_takes_none_of_that_memory(monkeypatch):
    monkeypatch.setattr(sum_groups, "MAX_BYTES_OF_SUMS", 2 * 16 * 4)
    monkeypatch.setattr(sum_groups, "MAX_ELEMENTS", 16)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 64))
    apply_lora(model, CONFIG)
    assert groups(model)


@pytest.mark.parametrize("layer", [nn.Embedding(4, 4), nn.Bilinear(4, 4, 4)])
def test_other_kinds_have_a_way_of_their_own(layer):
    model = nn.Sequential(layer)
    apply_lora(model, CONFIG, compute="weights")
    assert not groups(model)


def test_each_recurrent_layer_is_a_group_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4, num_layers=2), nn.GRUCell(4, 4), nn.Linear(4, 4))
    apply_lora(model, CONFIG)
    of_layers = [{summed.group for summed in layer.lora.sums.values()} for _, layer in adapted_layers(model)]
    assert [len(layer.lora.sums) for _, layer in adapted_layers(model)] == [1, 4, 2, 1]
    assert of_layers[0] == of_layers[3] and [len(groups) for groups in of_layers] == [1, 1, 1, 1]
    assert len(set.union(*of_layers)) == 3


def test_on_the_side_of_the_activations_there_are_no_groups():
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, CONFIG, compute="activations")
    assert not groups(model)
    apply_lora(model, CONFIG, compute="weights")  # no part of the configuration: the same adapters, on the other side
    assert groups(model)
    compute_on_activations(model)
    assert not groups(model)


def test_work_of_a_strided_convolution_is_counted_by_its_output():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1))
    apply_lora(model, CONFIG, compute="weights")
    x = torch.randn(1, 4, 8, 8)
    assert x.numel() // model[0].lora.sums["weight"].width == model(x)[0, 0].numel()
