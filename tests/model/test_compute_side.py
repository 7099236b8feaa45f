"""Which layers compute on the weight's side, and which rows, ranks and scales their sums have."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora
from lightning_lora.layers.sums.reading import summed_weight
from lightning_lora.ops import dispatch
from tests.helpers import oracles
from tests.helpers.models import FusedBlocks, Tower
from tests.helpers.oracles import same_bits
from tests.helpers.weight_side import (
    SIDES,
    WrittenOut,
    X,
    adapted,
    assert_close,
    assert_same_gradients,
    counted_sums,
    tower,
)


def side_of(layer, x):
    return "activations" if summed_weight(layer, x) is None else "weights"


@pytest.fixture
def on_cpu(monkeypatch):
    """Let `compute="auto"` take the weight's side on the CPU."""
    monkeypatch.setattr(dispatch, "DEVICES", ("cuda", "cpu"))


@pytest.mark.parametrize("compute", ["auto", *SIDES])
def test_the_side_that_was_asked_for(compute):
    model = tower(compute)
    assert {side_of(layer, X) for layer in model.layers} == {"weights" if compute == "weights" else "activations"}
    assert_close(model(X), WrittenOut(model)(X))


def test_auto_takes_the_weights_of_small_layers_and_short_inputs(on_cpu):
    model = adapted(nn.Sequential(nn.Linear(2048, 2048, bias=False)), "auto")
    x = torch.zeros(1, 1).expand(10, 2048).contiguous()
    assert side_of(model[0], x) == "weights"
    assert (
        side_of(model[0], torch.zeros(1).expand(10**6, 2048)) == "activations"
    )  # its products take longer than a launch


def test_auto_takes_the_weights_of_longer_inputs_under_checkpointing(on_cpu):
    model = adapted(nn.Sequential(nn.Linear(2048, 2048, bias=False)), "auto")
    x = torch.zeros(1).expand(12_000, 2048)
    assert side_of(model[0], x) == "activations"
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert side_of(model[0], x) == "weights"
        assert side_of(model[0], torch.zeros(1).expand(40_000, 2048)) == "activations"


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="`compute` must be one of 'auto', 'activations', 'weights'"):
        apply_lora(Tower(), LoRAConfig(), compute="both")


def test_dropout_takes_the_other_side_or_is_refused(on_cpu):
    plain = Tower()
    with pytest.raises(ValueError, match=r"`compute='weights'` .* dropout=0.5. Set dropout=0, or leave `compute` out"):
        apply_lora(plain, LoRAConfig(r=2, targets="all", dropout=0.5), compute="weights")
    assert all(type(layer) is nn.Linear for layer in plain.layers)
    model = tower("auto", dropout=0.5)
    assert {side_of(layer, X) for layer in model.layers} == {"activations"}
    model.eval()
    assert {side_of(layer, X) for layer in model.layers} == {"weights"}
    assert_close(model(X), WrittenOut(model)(X))
    model.train()
    torch.manual_seed(3)
    present = model(X)
    other = tower("activations", dropout=0.5)
    torch.manual_seed(3)
    assert same_bits(present, other(X))


def test_a_second_call_with_another_side_regroups():
    config = LoRAConfig(r=2, alpha=3, targets="all")
    model = Tower()
    apply_lora(model, config)
    oracles.train_by_hand(model)
    before = oracles.snapshot(model)
    for compute in ("weights", "activations", "weights", "auto"):
        apply_lora(model, config, compute=compute)
        assert {side_of(layer, X) for layer in model.layers} == {"weights" if compute == "weights" else "activations"}
        oracles.assert_same_values(model, before)
        assert_close(model(X), WrittenOut(model)(X))


@pytest.mark.slow
def test_a_merged_model_is_unmerged_onto_the_side_that_is_asked_for():
    model = tower("activations")
    expected = WrittenOut(model)(X)
    merge_lora(model)
    apply_lora(model, LoRAConfig(r=2, alpha=3, targets="all"), compute="weights")
    assert {side_of(layer, X) for layer in model.layers} == {"weights"}
    assert_close(model(X), expected)
    remove_lora(model)
    assert all(type(layer) is nn.Linear for layer in model.layers)


@pytest.mark.parametrize("targets", ["qv", "all", ["qkv.k"]])
def test_rows_of_fused_projections(targets):
    models = [adapted(FusedBlocks().double(), side, targets=targets) for side in SIDES]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for model in models:
        model(x).square().sum().backward()
    assert side_of(models[0].blocks[0].qkv, x) == "weights"
    assert_close(models[0](x), models[1](x))
    assert_same_gradients(*models)


def test_untouched_rows_have_the_bits_of_the_base():
    model = FusedBlocks()
    plain = copy.deepcopy(model)
    adapted(model, targets=["qkv.k"])
    total = summed_weight(model.blocks[0].qkv, torch.zeros(1, 3, 4))
    base = plain.blocks[0].qkv.weight
    assert same_bits(total[:4], base[:4]) and same_bits(total[8:], base[8:])
    assert (total[4:8] - base[4:8]).abs().min() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {"layers.1": 3}},
        {"alpha_pattern": {"layers.1": 7.0}},
        {"rank_pattern": {"layers.0": 1}, "alpha_pattern": {"layers.2": 0.5}},
        {"rslora": True},
        {"targets": ["layers.0", "layers.2"]},
    ],
    ids=str,
)
def test_ranks_and_scales(arguments):
    models = [tower(side, **arguments) for side in SIDES]
    for model in models:
        model(X).square().sum().backward()
    assert_close(models[0](X), models[1](X))
    assert_same_gradients(*models)


def test_the_scale_of_rslora_is_that_of_its_root():
    layer = tower(rslora=True).layers[0]
    pair = layer.lora["default"]
    assert_close(summed_weight(layer, X), layer.weight + 3 / math.sqrt(2) * pair.B @ pair.A)


def test_layers_of_several_shapes_and_kinds_in_one_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1, groups=2),
            nn.Conv2d(6, 6, 1),
            nn.Flatten(),
            nn.Linear(6 * 16, 6),
            nn.Linear(6, 6),
        ).double()
    twin = copy.deepcopy(model)
    adapted(model)
    adapted(twin, "activations")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with counted_sums() as sums:
        model(x).square().sum().backward()
    assert sums
    twin(x).square().sum().backward()
    assert_close(model(x), twin(x))
    assert_same_gradients(model, twin)


def test_conv1d_of_transformers_gives_the_same_on_both_sides():
    models = []
    for side in SIDES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(oracles.conv1d(6, 4), nn.Tanh(), oracles.conv1d(4, 6))
        models.append(adapted(model, side))
        models[-1](X).square().sum().backward()
    assert_close(models[0](X), models[1](X))
    assert_same_gradients(*models)


def test_layers_without_a_weights_side_compute_as_before():
    models = []
    for side in SIDES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)])
        models.append(adapted(model, side))
        embedding, linear, lstm = model
        lstm(linear(embedding(torch.tensor([[0, 1, 4]]))))[0].square().sum().backward()
    assert_same_gradients(*models)


def test_a_model_whose_layers_share_weights():
    models = []
    for side in SIDES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Tower()
        model.layers[2].weight = model.layers[0].weight
        adapted(model, side)
        model(X).square().sum().backward()
        models.append(model)
    assert_close(models[0](X), models[1](X))
    assert_same_gradients(*models)


def test_a_layer_in_two_places_is_one_layer():
    models = []
    for side in SIDES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Tower()
        model.layers[2] = model.layers[0]
        adapted(model, side)
        model(X).square().sum().backward()
        models.append(model)
    assert_close(models[0](X), models[1](X))
    assert_same_gradients(*models)
