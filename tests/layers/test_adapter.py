"""The pair (A, B) as a module: fp32 through every cast, what loads into it, and what it prints."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora
from tests.helpers import oracles

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to-keyword": lambda model: model.to(device="cpu", dtype=torch.float16),
    "type": lambda model: model.type(torch.float64),
    "there-and-back": lambda model: model.half().float(),
    "twice": lambda model: model.half().to(torch.bfloat16),
}


def two_layers(**arguments):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply_lora(model, LoRAConfig(**({"r": 2, "targets": "all"} | arguments)))
    oracles.train_by_hand(model)
    return model


def pair(layer):
    return layer.lora.default.A, layer.lora.default.B


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_and_b_stay_the_same_fp32_parameters_when_the_model_is_cast(cast):
    model = two_layers()
    before = pair(model[0])
    values = [matrix.detach().clone() for matrix in before]
    weight = model[0].weight.detach().clone()
    cast(model)
    assert pair(model[0]) == before  # the very objects that an optimizer holds
    assert [oracles.same_bits(now, then) for now, then in zip(pair(model[0]), values, strict=True)] == [True, True]
    assert not oracles.same_bits(model[0].weight, weight)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_gradients_stay_fp32_when_the_model_is_cast(cast):
    model = two_layers()
    model(torch.ones(4)).sum().backward()
    gradients = [matrix.grad.clone() for matrix in pair(model[0])]
    cast(model)
    for matrix, expected in zip(pair(model[0]), gradients, strict=True):
        assert matrix.grad.dtype == torch.float32
        assert oracles.same_bits(matrix.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_model_computes_in_its_dtype_and_trains_fp32(dtype):
    model = two_layers().to(dtype)
    output = model(torch.ones(3, 4, dtype=dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert {matrix.grad.dtype for layer in model for matrix in pair(layer)} == {torch.float32}


def test_an_update_that_bf16_would_lose_is_kept():
    model = two_layers().to(torch.bfloat16)
    A = model[0].lora.default.A
    A.data.fill_(1)
    optimizer = torch.optim.SGD([A], lr=1e-4)
    A.grad = torch.ones_like(A)
    optimizer.step()
    assert float(A.detach()[0, 0]) == pytest.approx(1 - 1e-4)
    model.half()
    assert float(A.detach()[0, 0]) == pytest.approx(1 - 1e-4)


def test_a_and_b_move_with_the_model():
    model = two_layers().to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model[0].lora.default.A.dtype == torch.float32


def test_reset_parameters_gives_the_start_back():
    model = two_layers(seed=3)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply_lora(fresh, LoRAConfig(r=2, targets="all", seed=3))
    model[0].lora.default.A.data.fill_(9)
    model[0].lora.default.reset_parameters()
    for one, other in zip(pair(model[0]), pair(fresh[0]), strict=True):
        assert oracles.same_bits(one, other)


def test_meta_model_gets_the_same_adapters_once_it_has_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    expected = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    apply_lora(expected, LoRAConfig(r=2, targets="all"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    for layer, other in zip(model, expected, strict=True):
        layer.lora.default.reset_parameters()
        assert all(oracles.same_bits(one, two) for one, two in zip(pair(layer), pair(other), strict=True))


def test_adapters_follow_the_mode_of_their_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].eval()
    apply_lora(model, LoRAConfig(targets="all", dropout=0.5))
    assert [layer.lora.default.training for layer in model] == [True, False]
    assert [layer.lora.default.training for layer in model.train()] == [True, True]
    assert [layer.lora.default.training for layer in model.eval()] == [False, False]


def test_it_prints_its_shape_rank_scale_and_dropout():
    model = nn.Sequential(nn.Linear(4, 6))
    apply_lora(model, LoRAConfig(r=2, alpha=3, targets="all", dropout=0.25))
    assert "4 -> 6, r=2, scale=1.5, dropout=0.25" in repr(model)
    assert repr(model).startswith("Sequential(\n  (0): LoRALinear(\n    in_features=4, out_features=6, bias=True")


def test_a_base_checkpoint_loads_strictly_and_leaves_the_adapters_alone():
    model, base = two_layers(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapters = [matrix.detach().clone() for layer in model for matrix in pair(layer)]
    result = model.load_state_dict(base.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert oracles.same_bits(model[1].weight, base[1].weight)
    now = [matrix for layer in model for matrix in pair(layer)]
    assert all(oracles.same_bits(one, other) for one, other in zip(now, adapters, strict=True))


def test_a_base_checkpoint_loads_into_a_bare_layer():
    layer, base = nn.Linear(4, 4), nn.Linear(4, 4)
    apply_lora(layer, LoRAConfig(targets="all"))
    layer.load_state_dict(base.state_dict())
    assert oracles.same_bits(layer.weight, base.weight)


@pytest.mark.parametrize("key", ["0.weight", "1.bias"])
def test_a_base_checkpoint_that_lacks_a_weight_is_refused(key):
    state = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.* "{key}"'):
        two_layers().load_state_dict(state)


@pytest.mark.parametrize("lost", [["0.lora.default.A"], ["1.lora.default.B"], ["1.lora.default.A", "1.lora.default.B"]])
def test_a_state_dict_that_lacks_some_of_the_adapters_is_refused(lost):
    model = two_layers()
    state = {key: value for key, value in model.state_dict().items() if key not in lost}
    with pytest.raises(RuntimeError, match=f'Missing key.* "{lost[0]}"'):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == lost


def test_an_adapted_state_dict_is_refused_by_a_plain_model():
    state = two_layers().state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "0\.lora\.default\.A"'):
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_state_dict_loads_into_another_adapted_model(assign):
    model, other = two_layers(), two_layers()
    oracles.train_by_hand(other, seed=9)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    oracles.assert_same_values(other, oracles.snapshot(model))


def test_after_a_merge_and_a_cast_the_private_adapters_are_still_fp32():
    model = two_layers()
    values = [matrix.detach().clone() for layer in model for matrix in pair(layer)]
    merge_lora(model)
    copied = copy.deepcopy(model).half()
    now = [parameter for _, parameter in lora_parameters(copied)]
    assert all(oracles.same_bits(one, other) for one, other in zip(now, values, strict=True))
