"""nn.EmbeddingBag: bags of rows, against the plain layer with the product in its weight."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import merge_lora
from tests.helpers import oracles
from tests.helpers.layer_cases.embedding_bag import CASES
from tests.helpers.oracles import SCALE, same_bits


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs, weights = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, inputs, weights


def trained(name, **arguments):
    model, inputs, weights = build(name)
    plain = copy.deepcopy(model.layer)
    return plain, oracles.adapt(model, **arguments), inputs, weights


@pytest.mark.parametrize("name", ["sum-by-frequency", "mean-by-frequency"])
def test_gradient_of_a_is_scaled_by_frequency_as_a_row_of_the_embedding(name):
    plain, model, inputs, _ = trained(name)
    adapter = model.layer.lora.default
    model.layer(*inputs).sum().backward()
    row = SCALE * adapter.B.detach().sum(0)
    twin = copy.deepcopy(plain)
    twin(*inputs).sum().backward()  # what each row of the plain weight gets, scaled by frequency
    oracles.assert_close(adapter.A.grad, row[:, None] * twin.weight.grad[:, 0], torch.float32)


@pytest.mark.parametrize("name", [name for name in CASES if "padding" in name])
def test_the_padding_row_never_moves(name):
    plain, model, inputs, weights = trained(name)
    index = plain.padding_idx
    assert not model.layer.lora.default.A[:, index].any()
    for _ in range(3):
        model.layer(*inputs, **weights).square().sum().backward()
        for matrix in (model.layer.lora.default.A, model.layer.lora.default.B):
            matrix.data -= 0.1 * matrix.grad
    assert not model.layer.lora.default.A[:, index].any()
    merge_lora(model)
    assert same_bits(model.layer.weight[index], plain.weight[index])
    assert not same_bits(model.layer.weight, plain.weight)


def test_empty_bags_give_zeros():
    _, model, inputs, _ = trained("sum-offsets")
    assert not model.layer(*inputs)[1].any()
    assert model.layer(*inputs)[0].any()


@pytest.mark.parametrize("name", ["sum", "max-offsets", "weighted"])
def test_indices_of_32_bits_are_taken_too(name):
    _, model, inputs, weights = trained(name)
    output = model.layer(*inputs, **weights)
    assert same_bits(model.layer(*(x.int() for x in inputs), **weights), output)


def test_it_is_the_bag_of_an_adapted_embedding():
    _, model, (index,), weights = trained("weighted")
    other = nn.Sequential()
    other.add_module("layer", nn.Embedding.from_pretrained(model.layer.weight.detach().clone()))
    oracles.adapt(other)
    other.layer.lora.default.load_state_dict(model.layer.lora.default.state_dict())
    wanted = (other.layer(index) * weights["per_sample_weights"][..., None]).sum(1)
    oracles.assert_close(model.layer(index, **weights), wanted, torch.float32)
