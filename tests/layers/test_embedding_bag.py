"""nn.EmbeddingBag: bags of rows, against the plain layer with the product in its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, apply_lora, disable_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import SCALE, same_bits

NUMBER, WIDTH = 11, 6
BAGS = torch.tensor([[1, 5, 5, 0], [10, 3, 1, 3], [5, 5, 5, 5]])
FLAT = torch.tensor([1, 5, 5, 0, 10, 3, 1, 3])
OFFSETS = torch.tensor([0, 3, 3, 5])  # the second bag is empty


class Halved(nn.EmbeddingBag):
    """Does something to what the forward that it inherits gives."""

    def forward(self, input, offsets=None, per_sample_weights=None):
        return super().forward(input, offsets, per_sample_weights) * 0.5


class Summed(nn.EmbeddingBag):
    """Reads its weight itself."""

    def forward(self, input):
        return self.weight[input].sum(1)


def case(*inputs, weighted=False, dtype=torch.float32, cls=nn.EmbeddingBag, **arguments):
    def make():
        layer = cls(NUMBER, WIDTH, **arguments).to(dtype)
        given = list(inputs) or [BAGS]
        weights = {"per_sample_weights": torch.randn(given[0].shape).to(dtype)} if weighted else {}
        return layer, given, weights

    return make


CASES = {
    "mean": case(),
    "sum": case(mode="sum"),
    "max": case(mode="max"),
    "mean-offsets": case(FLAT, OFFSETS),
    "sum-offsets": case(FLAT, OFFSETS, mode="sum"),
    "max-offsets": case(FLAT, OFFSETS, mode="max"),
    "mean-last-offset": case(FLAT, torch.tensor([0, 3, 3, 5, 8]), include_last_offset=True),
    "max-last-offset": case(FLAT, torch.tensor([0, 3, 3, 8]), include_last_offset=True, mode="max"),
    "weighted": case(mode="sum", weighted=True),
    "weighted-offsets": case(FLAT, OFFSETS, mode="sum", weighted=True),
    "weighted-padding": case(mode="sum", weighted=True, padding_idx=5),
    "mean-padding": case(padding_idx=5),
    "sum-padding-from-the-end": case(mode="sum", padding_idx=-1),
    "max-padding": case(mode="max", padding_idx=5),
    "mean-padding-offsets": case(FLAT, OFFSETS, padding_idx=5),
    "mean-max-norm": case(max_norm=1.0),
    "sum-max-norm-l1": case(mode="sum", max_norm=2.0, norm_type=1.0, padding_idx=0),
    "max-max-norm": case(mode="max", max_norm=1.0),
    "weighted-max-norm": case(mode="sum", max_norm=1.0, weighted=True),
    "sum-sparse": case(mode="sum", sparse=True),
    "mean-sparse": case(FLAT, OFFSETS, sparse=True),
    "sum-by-frequency": case(mode="sum", scale_grad_by_freq=True),
    "mean-by-frequency": case(FLAT, OFFSETS, scale_grad_by_freq=True),
    "fp64": case(mode="sum", dtype=torch.float64, weighted=True),
    "mean-fp64": case(dtype=torch.float64),
    "bf16": case(mode="mean", dtype=torch.bfloat16),
    "weighted-bf16": case(mode="sum", dtype=torch.bfloat16, weighted=True),
    "max-bf16": case(mode="max", dtype=torch.bfloat16),
    "fp16": case(mode="sum", dtype=torch.float16, padding_idx=1),
    "super": case(cls=Halved, mode="sum", weighted=True),
    "own": case(cls=Summed),
}
every_case = pytest.mark.parametrize("name", CASES)
DENSE = [name for name in CASES if "frequency" not in name]


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


def leaves(model):
    adapter = model.layer.lora.default
    return [matrix.detach().double().requires_grad_() for matrix in (adapter.A, adapter.B)]


def summed(plain, A, B):
    """The weight with the product added; the row at the padding index has no gradient, as in the plain layer."""
    delta = SCALE * (B @ A).t()
    if plain.padding_idx is not None:
        delta = torch.where((torch.arange(NUMBER) == plain.padding_idx)[:, None], delta.detach(), delta)
    return plain.weight.detach().double() + delta


def expected(plain, A, B, inputs, weights):
    """What the plain layer gives in fp64 with the product added to its weight."""
    twin = copy.deepcopy(plain).double()
    twin.sparse = False
    given = {key: value.double() for key, value in weights.items()}
    return functional_call(twin, {"weight": summed(plain, A, B)}, tuple(inputs), given)


def shortened(weight, plain):
    """Rows cut to ``max_norm``, each by the gradient-free factor that torch takes."""
    norm = weight.detach().norm(plain.norm_type, dim=1, keepdim=True)
    return torch.where(norm > plain.max_norm, weight * plain.max_norm / (norm + 1e-7), weight)


@every_case
def test_start_is_the_plain_layers_bit_for_bit(name):
    model, inputs, weights = build(name)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=3, targets=["layer"]))
    assert model.layer.lora.default.A.abs().sum() > 0
    assert same_bits(model.layer(*inputs, **weights), plain.layer(*inputs, **weights))
    with torch.no_grad():
        assert same_bits(model.eval().layer(*inputs, **weights), plain.eval().layer(*inputs, **weights))


@every_case
def test_output_is_that_of_the_weight_with_the_product_added(name):
    plain, model, inputs, weights = trained(name)
    wanted = expected(plain, *leaves(model), inputs, weights)
    found = model.layer(*inputs, **weights)
    assert found.dtype == plain.weight.dtype
    assert same_bits(model.eval().layer(*inputs, **weights), found)
    assert not torch.allclose(plain(*inputs, **weights).double(), wanted, rtol=0.1)  # the adapter matters
    oracles.assert_close(found, wanted, plain.weight.dtype)
    with torch.inference_mode():
        oracles.assert_close(model.layer(*inputs, **weights), wanted, plain.weight.dtype)


@pytest.mark.parametrize("name", DENSE)
def test_gradients_are_those_through_the_weight_with_the_product_added(name):
    plain, model, inputs, weights = trained(name)
    model, plain = model.double(), plain.double()
    given = {key: value.double().requires_grad_() for key, value in weights.items()}
    A, B = leaves(model)
    if plain.max_norm is None:
        wanted = expected(plain, A, B, inputs, given)
    else:
        wanted = through_max_norm(plain, summed(plain, A, B), inputs, given)
    mixed = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((wanted * mixed).sum(), [A, B, *given.values()])
    (model.layer(*inputs, **given) * mixed).sum().backward()
    adapter = model.layer.lora.default
    for matrix, gradient in zip([adapter.A, adapter.B, *given.values()], gradients, strict=True):
        assert matrix.grad.layout == torch.strided
        oracles.assert_close(matrix.grad, gradient, torch.float32)
    assert adapter.A.grad.dtype == adapter.B.grad.dtype == torch.float32
    assert model.layer._parameters["weight"].grad is None


def through_max_norm(plain, weight, inputs, weights):
    """The plain layer renormalises outside the graph: the gradient passes as if it had not."""
    short = weight + (shortened(weight.detach(), plain) - weight.detach())
    twin = copy.deepcopy(plain)
    twin.max_norm, twin.sparse = None, False
    return functional_call(twin, {"weight": short}, tuple(inputs), weights)


@pytest.mark.parametrize("name", ["sum-by-frequency", "mean-by-frequency"])
def test_gradient_of_a_is_scaled_by_frequency_as_a_row_of_the_embedding(name):
    plain, model, inputs, _ = trained(name)
    adapter = model.layer.lora.default
    model.layer(*inputs).sum().backward()
    row = SCALE * adapter.B.detach().sum(0)
    twin = copy.deepcopy(plain)
    twin(*inputs).sum().backward()  # what each row of the plain weight gets, scaled by frequency
    oracles.assert_close(adapter.A.grad, row[:, None] * twin.weight.grad[:, 0], torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_merged_output_equals_the_unmerged_one_and_unmerge_gives_every_bit_back(name):
    plain, model, inputs, weights = trained(name)
    values, output = oracles.snapshot(model), model.layer(*inputs, **weights)
    dtype = torch.float32 if plain.weight.dtype == torch.float64 else plain.weight.dtype
    for _ in range(2):
        merge_lora(model)
        assert type(model.layer) is type(plain)
        oracles.assert_close(model.layer(*inputs, **weights), output, dtype)
        merged = oracles.snapshot(model)
        model.layer(*inputs, **weights)
        oracles.assert_same_values(model, merged)
        unmerge_lora(model)
        oracles.assert_same_values(model, values)
        assert same_bits(model.layer(*inputs, **weights), output)


@every_case
def test_parameters_and_keys_are_the_originals(name):
    model, inputs, weights = build(name)
    layer, keys, weight = model.layer, list(model.state_dict()), model.layer.weight
    before = weight.detach().clone()
    for leave in (merge_lora, remove_lora):
        oracles.adapt(model)
        layer(*inputs, **weights)
        assert layer._parameters["weight"] is weight
        assert layer.lora.default.A.shape == (3, NUMBER)
        assert layer.lora.default.B.shape == (WIDTH, 3)
        leave(model)
        assert model.layer is layer and list(model.state_dict()) == keys
        assert layer.weight is weight
    assert same_bits(weight, before)  # also with max_norm the frozen rows stay


@every_case
def test_disable_gives_the_plain_output(name):
    plain, model, inputs, weights = trained(name)
    with disable_lora(model):
        assert same_bits(model.layer(*inputs, **weights), plain(*inputs, **weights))


@every_case
def test_copies_act_alike_and_stand_alone(name):
    _, model, inputs, weights = trained(name)
    values, output = oracles.snapshot(model), model.layer(*inputs, **weights)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert type(other.layer) is type(model.layer)
        assert same_bits(other.layer(*inputs, **weights), output)
        merge_lora(other)
    oracles.assert_same_values(model, values)


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


@pytest.mark.parametrize("name", ["mean", "weighted", "max"])
def test_autocast_gives_what_the_plain_layer_would(name):
    plain, model, inputs, weights = trained(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base, found = plain(*inputs, **weights), model.layer(*inputs, **weights)
    assert found.dtype == base.dtype
    oracles.assert_close(found, expected(plain, *leaves(model), inputs, weights), torch.bfloat16)


def test_it_is_the_bag_of_an_adapted_embedding():
    _, model, (index,), weights = trained("weighted")
    other = nn.Sequential()
    other.add_module("layer", nn.Embedding.from_pretrained(model.layer.weight.detach().clone()))
    oracles.adapt(other)
    other.layer.lora.default.load_state_dict(model.layer.lora.default.state_dict())
    wanted = (other.layer(index) * weights["per_sample_weights"][..., None]).sum(1)
    oracles.assert_close(model.layer(index, **weights), wanted, torch.float32)
