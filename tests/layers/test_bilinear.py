"""nn.Bilinear: the weight as a matrix over all pairs of the two inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, disable_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import SCALE, same_bits

FIRST, SECOND, OUT = 4, 5, 6


class Weighted(nn.Bilinear):
    """Does something to what the forward that it inherits gives."""

    def forward(self, input1, input2):
        return 2 * super().forward(input1, input2)


class Outer(nn.Bilinear):
    """Reads its weight itself."""

    def forward(self, input1, input2):
        return torch.einsum("...i,oij,...j->...o", input1, self.weight, input2)


def case(*leading, cls=nn.Bilinear, sizes=(FIRST, SECOND, OUT), dtype=torch.float32, **arguments):
    def make():
        inputs = [torch.randn(*leading, size, dtype=dtype) for size in sizes[:2]]
        return cls(*sizes, **arguments).to(dtype), inputs

    return make


CASES = {
    "batch": case(3),
    "no-bias": case(3, bias=False),
    "more-dimensions": case(2, 3, 2),
    "more-dimensions-no-bias": case(2, 3, bias=False),
    "vector": case(),
    "one-output": case(3, sizes=(4, 5, 1)),
    "one-feature": case(3, sizes=(1, 5, 2)),
    "fp64": case(3, dtype=torch.float64),
    "bf16": case(2, 3, dtype=torch.bfloat16),
    "super": case(3, cls=Weighted),
    "own": case(3, cls=Outer, bias=False),
}
every_case = pytest.mark.parametrize("name", CASES)
INSIDE = [name for name in CASES if name != "own"]  # where the adapter sees the inputs


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs = CASES[name]()
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


@every_case
def test_start_is_the_plain_layers_bit_for_bit(name):
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=3, targets=["layer"]))
    assert model.layer.lora.default.A.abs().sum() > 0
    assert same_bits(model.layer(*inputs), plain.layer(*inputs))
    with torch.no_grad():
        assert same_bits(model.eval().layer(*inputs), plain.eval().layer(*inputs))


@every_case
def test_output_is_that_of_the_weight_with_the_product_added(name):
    plain, model, inputs = trained(name)
    wanted = expected(plain, *leaves(model), inputs)
    found = model.layer(*inputs)
    assert found.shape == wanted.shape and found.dtype == plain.weight.dtype
    oracles.assert_close(found, wanted, plain.weight.dtype)
    assert same_bits(model.eval().layer(*inputs), found)
    with torch.inference_mode():
        oracles.assert_close(model.layer(*inputs), wanted, plain.weight.dtype)
    assert not torch.allclose(plain(*inputs).double(), wanted, rtol=0.1)  # the adapter matters


@every_case
def test_gradients_are_those_through_the_weight_with_the_product_added(name):
    plain, model, inputs = trained(name)
    model, plain, inputs = model.double(), plain.double(), [x.double().requires_grad_() for x in inputs]
    A, B = leaves(model)
    wanted = expected(plain, A, B, inputs)
    mixed = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((wanted * mixed).sum(), [A, B, *inputs])
    (model.layer(*inputs) * mixed).sum().backward()
    adapter = model.layer.lora.default
    for matrix, gradient in zip([adapter.A, adapter.B, *inputs], gradients, strict=True):
        oracles.assert_close(matrix.grad, gradient, torch.float32)
    assert adapter.A.grad.dtype == torch.float32
    assert model.layer._parameters["weight"].grad is None
    assert model.layer.bias is None or model.layer.bias.grad is None


@every_case
def test_merged_output_equals_the_unmerged_one_and_unmerge_gives_every_bit_back(name):
    plain, model, inputs = trained(name)
    values, output = oracles.snapshot(model), model.layer(*inputs)
    for _ in range(2):
        merge_lora(model)
        assert type(model.layer) is type(plain)
        assert not same_bits(model.layer.weight, plain.weight)
        oracles.assert_close(model.layer(*inputs), output, plain.weight.dtype)
        unmerge_lora(model)
        oracles.assert_same_values(model, values)
        assert same_bits(model.layer(*inputs), output)


@every_case
def test_parameters_and_keys_are_the_originals(name):
    model, inputs = build(name)
    layer, keys, parameters = model.layer, list(model.state_dict()), dict(model.layer.named_parameters())
    for leave in (merge_lora, remove_lora):
        oracles.adapt(model)
        layer(*inputs)
        assert all(layer._parameters[key] is parameters[key] for key in parameters)
        assert layer.lora.default.A.shape == (3, layer.in1_features * layer.in2_features)
        assert layer.lora.default.B.shape == (layer.out_features, 3)
        leave(model)
        assert model.layer is layer and list(model.state_dict()) == keys
        assert all(layer.get_parameter(key) is parameters[key] for key in parameters)


@every_case
def test_disable_gives_the_plain_output(name):
    plain, model, inputs = trained(name)
    with disable_lora(model):
        assert same_bits(model.layer(*inputs), plain(*inputs))


@every_case
def test_copies_act_alike_and_stand_alone(name):
    _, model, inputs = trained(name)
    values, output = oracles.snapshot(model), model.layer(*inputs)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert type(other.layer) is type(model.layer)
        assert same_bits(other.layer(*inputs), output)
        merge_lora(other)
    oracles.assert_same_values(model, values)


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
def test_autocast_computes_in_the_dtype_of_the_plain_layer(name):
    plain, model, inputs = trained(name)
    wanted = expected(plain, *leaves(model), inputs)
    fresh, _ = build(name)
    apply_lora(fresh, LoRAConfig(r=3, targets=["layer"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = plain(*inputs)
        assert same_bits(fresh.layer(*inputs), base)
        found = model.layer(*inputs)
    assert found.dtype == base.dtype
    oracles.assert_close(found, wanted, torch.bfloat16)
