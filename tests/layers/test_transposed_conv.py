"""nn.ConvTranspose1d, 2d and 3d: against the plain layer with the product in its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, disable_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import SCALE, same_bits


class Scaled(nn.ConvTranspose2d):
    """Does something to what the forward that it inherits gives."""

    def forward(self, x, output_size=None):
        return super().forward(x, output_size) * 0.5


class Centred(nn.ConvTranspose1d):
    """Reads its weight itself."""

    def forward(self, x):
        return F.conv_transpose1d(x, self.weight - self.weight.mean(), self.bias, self.stride)


def case(cls, shape, sizes=(4, 6, 3), dtype=torch.float32, call=None, **arguments):
    return lambda: (cls(*sizes, **arguments).to(dtype), torch.randn(shape).to(dtype), call or {})


ONE, TWO, THREE = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
CASES = {
    "1d": case(ONE, (2, 4, 7)),
    "1d-unbatched": case(ONE, (4, 7), stride=2),
    "1d-stride": case(ONE, (2, 4, 7), stride=3, padding=1, output_padding=2),
    "1d-dilation": case(ONE, (2, 4, 7), dilation=2, padding=2, bias=False),
    "1d-groups": case(ONE, (2, 4, 7), groups=2, stride=2),
    "1d-depthwise": case(ONE, (2, 4, 7), sizes=(4, 8, 3), groups=4),
    "1d-output-size": case(ONE, (2, 4, 7), stride=2, call={"output_size": [16]}),
    "2d": case(TWO, (2, 4, 5, 6)),
    "2d-no-bias": case(TWO, (2, 4, 5, 6), bias=False),
    "2d-pointwise": case(TWO, (2, 4, 5, 6), sizes=(4, 6, 1)),
    "2d-unbatched": case(TWO, (4, 5, 6), groups=2),
    "2d-stride": case(TWO, (2, 4, 5, 6), sizes=(4, 6, (3, 2)), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    "2d-dilation": case(TWO, (2, 4, 5, 6), dilation=(1, 2), padding=(0, 1), stride=2),
    "2d-groups": case(TWO, (2, 4, 5, 6), groups=2, stride=2, output_padding=1, dilation=2),
    "2d-output-size": case(TWO, (2, 4, 5, 6), stride=2, padding=1, call={"output_size": [10, 11]}),
    "2d-output-size-in-full": case(TWO, (2, 4, 5, 6), stride=2, groups=2, call={"output_size": (2, 6, 12, 13)}),
    "2d-channels-last": lambda: (TWO(4, 6, 3).to(memory_format=torch.channels_last), torch.randn(2, 4, 5, 6), {}),
    "3d": case(THREE, (2, 2, 3, 4, 3), sizes=(2, 4, 2)),
    "3d-all": case(
        THREE, (2, 2, 3, 4, 3), sizes=(2, 4, (2, 3, 2)), stride=(2, 1, 3), padding=1, groups=2, output_padding=(1, 0, 2)
    ),
    "3d-dilation": case(THREE, (1, 2, 3, 3, 3), sizes=(2, 4, 2), dilation=(1, 2, 1), bias=False),
    "3d-output-size": case(THREE, (1, 2, 3, 3, 3), sizes=(2, 4, 2), stride=2, call={"output_size": [6, 7, 7]}),
    "1d-fp64": case(ONE, (2, 4, 7), dtype=torch.float64, groups=2, stride=2),
    "2d-fp64": case(TWO, (2, 4, 5, 6), dtype=torch.float64, stride=2),
    "2d-bf16": case(TWO, (2, 4, 5, 6), dtype=torch.bfloat16, stride=2),
    "1d-bf16-groups": case(ONE, (2, 4, 7), dtype=torch.bfloat16, groups=2, bias=False),
    "super": case(Scaled, (2, 4, 5, 6), stride=2, call={"output_size": [12, 13]}),
    "own": case(Centred, (2, 4, 7), stride=2),
}
every_case = pytest.mark.parametrize("name", CASES)


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, x, others = CASES[name]()
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


@every_case
def test_start_is_the_plain_layers_bit_for_bit(name):
    model, x, others = build(name)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=3, targets=["layer"]))
    assert model.layer.lora.default.A.abs().sum() > 0
    assert same_bits(model.layer(x, **others), plain.layer(x, **others))
    with torch.no_grad():
        assert same_bits(model.eval().layer(x, **others), plain.eval().layer(x, **others))


@every_case
def test_output_is_that_of_the_weight_with_the_product_added(name):
    plain, model, x, others = trained(name)
    wanted = expected(plain, *leaves(model), x, others)
    found = model.layer(x, **others)
    assert found.shape == wanted.shape and found.dtype == plain.weight.dtype
    oracles.assert_close(found, wanted, plain.weight.dtype)
    assert same_bits(model.eval().layer(x, **others), found)
    with torch.inference_mode():
        oracles.assert_close(model.layer(x, **others), wanted, plain.weight.dtype)
    assert not torch.allclose(plain(x, **others).double(), wanted, rtol=0.1)  # the adapter matters


@every_case
def test_gradients_are_those_through_the_weight_with_the_product_added(name):
    plain, model, x, others = trained(name)
    model, plain, x = model.double(), plain.double(), x.double().requires_grad_()
    A, B = leaves(model)
    wanted = expected(plain, A, B, x, others)
    mixed = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((wanted * mixed).sum(), [A, B, x])
    (model.layer(x, **others) * mixed).sum().backward()
    adapter = model.layer.lora.default
    for matrix, gradient in zip([adapter.A, adapter.B, x], gradients, strict=True):
        oracles.assert_close(matrix.grad, gradient, torch.float32)
    assert adapter.A.grad.dtype == adapter.B.grad.dtype == torch.float32
    assert model.layer._parameters["weight"].grad is None
    assert model.layer.bias is None or model.layer.bias.grad is None


@every_case
def test_merged_output_equals_the_unmerged_one_and_unmerge_gives_every_bit_back(name):
    plain, model, x, others = trained(name)
    values, output = oracles.snapshot(model), model.layer(x, **others)
    total = plain.weight.double() + product(plain, *leaves(model))
    for _ in range(2):
        merge_lora(model)
        assert type(model.layer) is type(plain)
        assert not same_bits(model.layer.weight, plain.weight)
        oracles.assert_close(model.layer.weight, total, plain.weight.dtype)
        oracles.assert_close(model.layer(x, **others), output, plain.weight.dtype)
        unmerge_lora(model)
        oracles.assert_same_values(model, values)
        assert same_bits(model.layer(x, **others), output)


@every_case
def test_parameters_strides_and_keys_are_the_originals(name):
    model, x, others = build(name)
    layer, keys, parameters = model.layer, list(model.state_dict()), dict(model.layer.named_parameters())
    strides = layer.weight.stride()
    for leave in (merge_lora, remove_lora):
        oracles.adapt(model)
        layer(x, **others)
        assert all(layer._parameters[key] is parameters[key] for key in parameters)
        assert layer.lora.default.A.shape == (3, layer.in_channels)
        assert layer.lora.default.B.shape == (layer.weight[0].numel(), 3)
        leave(model)
        assert model.layer is layer and list(model.state_dict()) == keys
        assert all(layer.get_parameter(key) is parameters[key] for key in parameters)
        assert layer.weight.stride() == strides


@every_case
def test_disable_gives_the_plain_output(name):
    plain, model, x, others = trained(name)
    with disable_lora(model):
        assert same_bits(model.layer(x, **others), plain(x, **others))


@every_case
def test_copies_act_alike_and_stand_alone(name):
    _, model, x, others = trained(name)
    values, output = oracles.snapshot(model), model.layer(x, **others)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert type(other.layer) is type(model.layer)
        assert same_bits(other.layer(x, **others), output)
        merge_lora(other)
    oracles.assert_same_values(model, values)


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


@pytest.mark.parametrize("name", ["1d-groups", "2d-output-size", "3d", "super", "own"])
def test_autocast_computes_in_the_dtype_of_the_plain_layer(name):
    plain, model, x, others = trained(name)
    wanted = expected(plain, *leaves(model), x, others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base, found = plain(x, **others), model.layer(x, **others)
    assert found.dtype == base.dtype == torch.bfloat16
    oracles.assert_close(found, wanted, torch.bfloat16)


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
