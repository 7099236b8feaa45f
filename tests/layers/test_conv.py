"""nn.ConvTranspose1d, 2d and 3d: against the plain layer with the product in its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.layer_cases.transposed_conv import CASES
from tests.helpers.oracles import SCALE


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, (x,), others = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, x, others


def trained(name, **arguments):
    model, x, others = build(name)
    plain = copy.deepcopy(model.layer)
    return plain, oracles.adapt(model, **arguments), x, others


def leaves(model):
    adapter = model.layer.lora.default
    return [matrix.detach().double().requires_grad_() for matrix in (adapter.A, adapter.B)]


def product(plain, A, B):
    """``scale * B A`` in the shape ``(in_channels, out_channels / groups, *kernel_size)``."""
    return SCALE * (B @ A).t().reshape(plain.weight.shape)


def expected(plain, A, B, x, others):
    """What the plain layer gives in fp64 with the product added to its weight."""
    weight = plain.weight.detach().double() + product(plain, A, B)
    return functional_call(copy.deepcopy(plain).double(), {"weight": weight}, (x.double(),), others)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("own", "super")])
def test_dropout_drops_the_adapters_input_in_training_alone(name):
    plain, model, x, others = trained(name, dropout=0.5)
    A, B = leaves(model)
    torch.manual_seed(7)
    found = model.layer(x, **others)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5).double()
    base, term = copy.deepcopy(plain).double(), copy.deepcopy(plain).double()
    term.bias = None
    delta = functional_call(term, {"weight": product(plain, A, B)}, (dropped,), others)
    oracles.assert_close(found, base(x.double(), **others) + delta, plain.weight.dtype)
    oracles.assert_close(model.eval().layer(x, **others), expected(plain, A, B, x, others), plain.weight.dtype)


def test_dropout_is_refused_where_a_subclass_reads_its_weight():
    with pytest.raises(ValueError, match=r"`layer` has code that .* `dropout=0.5` cannot act: set dropout=0"):
        trained("own", dropout=0.5)


@pytest.mark.parametrize("size", [[13], [10], [14, 14]])
def test_an_output_size_out_of_reach_raises(size):
    plain, model, x, _ = trained("1d-output-size")
    with pytest.raises(ValueError, match="output"):
        plain(x, output_size=size)
    with pytest.raises(ValueError, match="output"):
        model.layer(x, output_size=size)


def test_output_size_chooses_among_the_lengths_of_a_stride():
    plain, model, x, _ = trained("1d-output-size")
    A, B = leaves(model)
    for size in ([15], [16], [2, 6, 16]):
        found = model.layer(x, output_size=size)
        assert found.shape[-1] == size[-1]
        oracles.assert_close(found, expected(plain, A, B, x, {"output_size": size}), torch.float32)
