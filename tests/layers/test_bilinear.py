"""nn.Bilinear: the weight as a matrix over all pairs of the two inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora
from tests.helpers import oracles
from tests.helpers.layer_cases.bilinear import CASES
from tests.helpers.oracles import SCALE, same_bits

INSIDE = [name for name in CASES if name != "own"]  # where the adapter sees the inputs


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs, _ = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, inputs


def trained(name, **arguments):
    model, inputs = build(name)
    plain = copy.deepcopy(model.layer)
    return plain, oracles.adapt(model, **arguments), inputs


def expected(plain, A, B, inputs):
    """What the plain layer gives in fp64 with the product added to its weight."""
    weight = plain.weight.detach().double() + SCALE * (B @ A).view(plain.weight.shape)
    return functional_call(copy.deepcopy(plain).double(), {"weight": weight}, tuple(x.double() for x in inputs))


def leaves(model):
    adapter = model.layer.lora.default
    return [matrix.detach().double().requires_grad_() for matrix in (adapter.A, adapter.B)]


@pytest.mark.parametrize("name", [name for name in INSIDE if name != "super"])
def test_dropout_drops_the_first_input_of_the_adapter_in_training_alone(name):
    plain, model, inputs = trained(name, dropout=0.5)
    A, B = leaves(model)
    torch.manual_seed(7)
    found = model.layer(*inputs)
    torch.manual_seed(7)
    dropped = F.dropout(inputs[0], 0.5).double()
    term = torch.einsum("...i,oij,...j->...o", dropped, SCALE * (B @ A).view(plain.weight.shape), inputs[1].double())
    oracles.assert_close(found, copy.deepcopy(plain).double()(*(x.double() for x in inputs)) + term, plain.weight.dtype)
    oracles.assert_close(model.eval().layer(*inputs), expected(plain, A, B, inputs), plain.weight.dtype)


def test_dropout_is_refused_where_a_subclass_reads_its_weight():
    with pytest.raises(ValueError, match=r"`layer` has code that .* `dropout=0.5` cannot act: set dropout=0"):
        trained("own", dropout=0.5)


@pytest.mark.parametrize("name", ["batch", "more-dimensions-no-bias", "super", "own"])
def test_start_in_autocast_is_the_plain_layers_bit_for_bit(name):
    model, inputs = build(name)
    plain = copy.deepcopy(model.layer)
    apply_lora(model, LoRAConfig(r=3, targets=["layer"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(model.layer(*inputs), plain(*inputs))
