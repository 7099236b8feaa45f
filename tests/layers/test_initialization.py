"""How A starts: its distribution, and that nothing but the seed, the layer and the adapter decides on it."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.adapter import default_seed, initial_A, seed_of
from tests.helpers import oracles


@pytest.fixture(autouse=True)
def no_seed_of_lightning(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def three_layers(order=("a", "b", "c")):
    model = nn.Module()
    for name in order:
        model.add_module(name, nn.Linear(6, 5, dtype=torch.float32))
    return model


def adapted(model=None, **arguments):
    model = model or three_layers()
    apply_lora(model, LoRAConfig(**({"r": 4, "targets": "all"} | arguments)))
    return {name: module.lora[arguments.get("name", "default")].A.detach() for name, module in model.named_children()}


def test_kaiming_is_uniform_as_the_weight_of_a_linear_layer():
    A = initial_A((64, 400), "kaiming", seed=0)
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert A.mean().abs() < 0.02 * bound
    torch.manual_seed(0)
    assert A.std() == pytest.approx(float(nn.Linear(400, 64).weight.detach().std()), rel=0.03)


def test_gaussian_has_standard_deviation_one_over_r():
    A = initial_A((16, 4000), "gaussian", seed=0)
    assert A.std() == pytest.approx(1 / 16, rel=0.01)
    assert A.mean().abs() < 1e-3
    assert (A.abs() > 3 / 16).float().mean() == pytest.approx(0.0027, rel=0.3)  # tails that a uniform one has not


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_is_fp32_on_the_cpu_of_shape_r_by_in(init, default_dtype):
    expected = initial_A((3, 7), init, seed=5)
    default_dtype(torch.float64)
    with torch.device("meta"):
        A = initial_A((3, 7), init, seed=5)
    assert (A.shape, A.dtype, A.device.type) == ((3, 7), torch.float32, "cpu")
    assert oracles.same_bits(A, expected)
    assert not torch.equal(A, initial_A((3, 7), init, seed=6))


def test_b_is_zero_and_a_is_not():
    model = three_layers()
    apply_lora(model, LoRAConfig(targets="all"))
    for layer in model.children():
        assert layer.lora.default.A.abs().min() > 0
        assert oracles.same_bits(layer.lora.default.B, torch.zeros(5, 8))


def test_a_does_not_depend_on_global_seed_default_dtype_or_order(default_dtype):
    torch.manual_seed(1)
    expected = adapted()
    torch.manual_seed(2)
    default_dtype(torch.float64)
    found = adapted(three_layers("cab"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not oracles.same_bits(expected[name], found[name])] == []


def test_a_does_not_depend_on_what_else_is_adapted():
    assert oracles.same_bits(adapted()["b"], apply_and_get_b())


def apply_and_get_b():
    model = three_layers()
    apply_lora(model, LoRAConfig(r=4, targets=["b"]))
    return model.b.lora.default.A


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_does_not_depend_on_the_dtype_of_the_base(dtype):
    assert oracles.same_bits(adapted()["a"], adapted(three_layers().to(dtype))["a"])


def test_every_layer_adapter_and_seed_starts_elsewhere():
    matrices = [*adapted().values(), adapted(name="other")["a"], adapted(seed=1)["a"], adapted(init="gaussian")["a"]]
    for position, one in enumerate(matrices):
        assert not any(torch.equal(one, other) for other in matrices[:position])


def test_global_random_streams_are_untouched():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 3, padding_idx=0), nn.Conv2d(2, 2, 1))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    apply_lora(model, LoRAConfig(targets=["0", "1", "2"], init="gaussian"))
    assert not torch.equal(streams[0], before[0])  # making layers moves the stream, so this test can tell
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    ("value", "seed"), [(None, 0), ("", 0), ("42", 42), ("-7", -7), ("4294967295", 4294967295), ("many", 0)]
)
def test_default_seed_is_the_one_that_seed_everything_left(monkeypatch, value, seed):
    if value is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", value)
    assert default_seed() == seed


def test_no_seed_means_lightnings_else_zero(monkeypatch):
    assert oracles.same_bits(adapted()["a"], adapted(seed=0)["a"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert oracles.same_bits(adapted()["a"], adapted(seed=5)["a"])
    assert not torch.equal(adapted()["a"], adapted(seed=0)["a"])


def test_seeds_fit_a_generator_and_never_change():
    seeds = {seed_of(seed, layer, adapter) for seed in (0, 1, -1) for layer in ("", "a", "a.b") for adapter in "xy"}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "layers.0.q_proj", "default") == 220675898818209990  # a resumed run must start from it too


def test_padding_index_of_an_embedding_starts_without_a_delta():
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=2))
    apply_lora(model, LoRAConfig(r=4, targets=["0"]))
    A = model[0].lora.default.A
    assert A[:, 2].abs().sum() == 0
    assert (A[:, [0, 1, 3, 4]] != 0).all()
