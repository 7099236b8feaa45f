"""Every kind of layer, by one table of cases: at the start, trained, merged, unmerged, copied and pickled."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import CASES, SCALE, adapt, as_double, assert_close, build, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Complex modules are")
every_case = pytest.mark.parametrize("case", CASES)
PADDED = [case for case in CASES if build(case)[0].layer.__dict__.get("padding_idx") is not None]
OWN_FORWARD = [case for case in CASES if case.startswith(("standardized", "normalized", "looked-up"))]
DROPPING = [case for case in CASES if case not in OWN_FORWARD and "embedding" not in case and "scaled" not in case]


def trained(case, **arguments):
    """The plain layer, the adapted model with trained adapters, and an input."""
    model, x = build(case)
    plain = copy.deepcopy(model.layer)
    return plain, adapt(model, **arguments), x


@every_case
def test_output_at_the_start_is_the_bases_bit_for_bit(case):
    model, x = build(case)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=3, targets=["layer"]))
    assert model.layer.lora.default.A.abs().sum() > 0
    assert same_bits(model(x), plain(x))
    assert same_bits(model.eval()(x), plain.eval()(x))


@every_case
def test_output_is_that_of_the_weight_with_the_product_added(case):
    plain, model, x = trained(case)
    expected = oracles.plain_with(plain, plain.weight.double() + oracles.product(model.layer))(as_double(x))
    assert_close(model(x), expected, plain.weight.dtype)
    assert same_bits(model.eval()(x), model.train()(x))
    assert not torch.allclose(expected, copy.deepcopy(plain).double()(as_double(x)), rtol=0.1)  # the adapter matters


# B's gradient is no row of an embedding, so scale_grad_by_freq scales only A's: that has a test of its own below.
@pytest.mark.parametrize("case", [case for case in CASES if case != "embedding-by-frequency"])
def test_gradients_are_those_through_the_weight_with_the_product_added(case):
    plain, model, x = trained(case)
    adapter = model.double().layer.lora.default
    A, B = (matrix.detach().double().requires_grad_() for matrix in (adapter.A, adapter.B))
    plain.sparse = False
    weight = plain.weight.detach().double() + oracles.shaped(SCALE * B @ A, plain)
    expected = functional_call(plain.double(), {"weight": weight}, (as_double(x),))
    mixed = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (expected * mixed).sum().backward()
    (model(as_double(x)) * mixed).sum().backward()
    assert_close(adapter.A.grad, A.grad, torch.float32)
    assert_close(adapter.B.grad, B.grad, torch.float32)
    assert model.layer.weight.grad is None
    assert getattr(model.layer, "bias", None) is None or model.layer.bias.grad is None


@every_case
def test_gradients_are_dense_and_fp32(case):
    _, model, x = trained(case)
    model(x).float().square().sum().backward()
    for matrix in (model.layer.lora.default.A, model.layer.lora.default.B):
        assert matrix.grad.dtype == torch.float32
        assert matrix.grad.layout == torch.strided
        assert matrix.grad.abs().sum() > 0


def test_gradient_of_a_is_scaled_by_frequency_as_a_row_of_the_embedding():
    model, index = build("embedding-by-frequency")
    adapter = adapt(model).layer.lora.default
    model(index).sum().backward()
    one_use = SCALE * adapter.B.detach().sum(0)  # of an index that is used once
    used = sorted(set(index.flatten().tolist()))
    assert_close(adapter.A.grad[:, used], one_use[:, None].expand(-1, len(used)), torch.float32)


@every_case
def test_merged_output_equals_the_unmerged_one(case):
    plain, model, x = trained(case)
    unmerged = model(x)
    merge_lora(model)
    assert type(model.layer) is type(plain)
    assert_close(model(x), unmerged, plain.weight.dtype)


@every_case
def test_merged_weight_is_the_rounded_sum(case):
    plain, model, _ = trained(case)
    expected = plain.weight.double() + oracles.product(model.layer)
    merge_lora(model)
    if case.startswith("embedding-max-norm"):
        torch.embedding_renorm_(expected.detach(), torch.arange(11), plain.max_norm, plain.norm_type)
    half_a_step = torch.finfo(plain.weight.dtype).eps / 2
    sum_of_products = 1e-6 if plain.weight.dtype != torch.float64 else 1e-15
    error = (model.layer.weight.double() - expected).abs()
    assert (error <= half_a_step * expected.abs() + sum_of_products).all()


@every_case
def test_unmerge_gives_every_bit_and_the_adapters_back(case):
    plain, model, x = trained(case)
    values, output = oracles.snapshot(model), model(x)
    for _ in range(2):
        merge_lora(model)
        assert not same_bits(model.layer.weight, plain.weight)
        unmerge_lora(model)
        oracles.assert_same_values(model, values)
        assert same_bits(model(x), output)


@every_case
def test_module_parameters_and_keys_are_the_originals_before_and_after(case):
    model, _ = build(case)
    layer, cls, keys = model.layer, type(model.layer), list(model.state_dict())
    strides, parameters = layer.weight.stride(), dict(layer.named_parameters())
    for leave in (merge_lora, remove_lora):
        adapt(model)
        assert model.layer is layer
        assert isinstance(layer, cls)
        assert keys == [key for key in model.state_dict() if ".lora." not in key]
        leave(model)
        assert type(model.layer) is cls
        assert list(model.state_dict()) == keys
        assert dict(layer.named_parameters()).keys() == parameters.keys()
        assert all(getattr(layer, name) is parameter for name, parameter in parameters.items())
        assert layer.weight.stride() == strides


@every_case
def test_remove_gives_the_bases_output_back(case):
    model, x = build(case)
    plain = copy.deepcopy(model)
    remove_lora(adapt(model))
    oracles.assert_same_values(model, oracles.snapshot(plain))
    assert same_bits(model(x), plain(x))
    assert model.layer.__dict__.keys() == plain.layer.__dict__.keys()


@every_case
def test_copies_of_adapted_layers_act_alike_and_stand_alone(case):
    plain, model, x = trained(case)
    values, output = oracles.snapshot(model), model(x)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert type(other.layer) is type(model.layer)
        assert same_bits(other(x), output)
        other.layer.lora.default.A.data.fill_(1)
        merge_lora(other)
        assert type(other.layer) is type(plain)
    oracles.assert_same_values(model, values)
    assert same_bits(model(x), output)


@every_case
def test_copies_of_merged_layers_unmerge_by_themselves(case):
    plain, model, _ = trained(case)
    values = oracles.snapshot(model)
    merge_lora(model)
    merged = oracles.snapshot(model)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        unmerge_lora(other)
        oracles.assert_same_values(other, values)
    oracles.assert_same_values(model, merged)
    assert type(model.layer) is type(plain)


@pytest.mark.parametrize("case", PADDED)
def test_padding_row_of_an_embedding_never_moves(case):
    plain, model, _ = trained(case)
    padding = torch.tensor([plain.padding_idx])
    expected = plain(padding)
    for _ in range(3):
        model(torch.arange(11)).square().sum().backward()
        for matrix in (model.layer.lora.default.A, model.layer.lora.default.B):
            matrix.data -= 0.1 * matrix.grad
    assert same_bits(model(padding), expected)
    merge_lora(model)
    assert same_bits(model(padding), expected)


def test_table_holds_embeddings_with_padding():
    assert len(PADDED) >= 5


@pytest.mark.parametrize("case", DROPPING)
def test_dropout_drops_the_adapters_input_in_training(case):
    plain, model, x = trained(case, dropout=0.5)
    shown = copy.deepcopy(plain).double()
    torch.manual_seed(7)
    found = model(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5).double()
    weight = oracles.product(model.layer)
    term = oracles.plain_with(plain, weight)
    term.bias = None
    assert_close(found, shown(x.double()) + linear_part(term, dropped), plain.weight.dtype)


def linear_part(plain, x):
    """The plain layer's map without a bias, which Hugging Face's Conv1D cannot go without."""
    return x @ plain.weight if type(plain).__name__ == "Conv1D" else plain(x)


@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN_FORWARD])
def test_dropout_does_nothing_in_eval(case):
    plain, model, x = trained(case, dropout=0.5)
    expected = oracles.plain_with(plain, plain.weight.double() + oracles.product(model.layer))(as_double(x))
    assert_close(model.eval()(x), expected, plain.weight.dtype)


@pytest.mark.parametrize("case", OWN_FORWARD)
def test_dropout_is_refused_where_it_cannot_act(case):
    model, _ = build(case)
    with pytest.raises(ValueError, match=r"`layer` has code that .* `dropout=0.5` cannot act: set dropout=0"):
        adapt(model, dropout=0.5)


def test_dropout_does_nothing_on_an_embedding():
    _, model, index = trained("embedding", dropout=0.9)
    assert same_bits(model.train()(index), model.eval()(index))


@every_case
def test_a_and_b_have_the_shapes_of_the_paper(case):
    plain, model, _ = trained(case)
    adapter = model.layer.lora.default
    assert adapter.A.shape[0] == adapter.B.shape[1] == 3
    out_features = plain.embedding_dim if isinstance(plain, nn.Embedding) else None
    in_features = plain.num_embeddings if isinstance(plain, nn.Embedding) else None
    if type(plain).__name__ == "Conv1D":
        in_features, out_features = plain.weight.shape
    assert adapter.B.shape[0] == (out_features or plain.weight.shape[0])
    assert adapter.A.shape[1] == (in_features or plain.weight[0].numel())


def test_weight_is_back_after_a_forward_that_fails():
    _, model, _ = trained("standardized-linear")
    weight = model.layer.weight
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 99))
    assert model.layer.weight is weight


def test_forward_hooks_stay_and_see_the_sum():
    model, x = build("linear")
    seen = []
    model.layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    adapt(model)
    output = model(x)
    assert seen[0] is output
    layer = model.layer
    expected = F.linear(2 * x.double(), layer.weight.double() + oracles.product(layer), layer.bias.double())
    assert_close(output, expected, torch.float32)


def test_max_norm_leaves_the_frozen_weight_alone():
    plain, model, index = trained("embedding-max-norm")
    model(index)
    assert plain.weight.norm(dim=1).max() > plain.max_norm
    assert same_bits(model.layer.weight, plain.weight)


def test_max_norm_of_a_merged_embedding_changes_nothing_more_on_a_lookup():
    _, model, index = trained("embedding-max-norm")
    merge_lora(model)
    merged = oracles.snapshot(model)
    model(index)
    oracles.assert_same_values(model, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d-groups", "hf-conv1d", "scaled-linear"])
def test_autocast_computes_in_its_dtype_as_the_plain_layer_does(case, dtype):
    plain, model, x = trained(case)
    expected = oracles.plain_with(plain, plain.weight.double() + oracles.product(model.layer))(x.double())
    with torch.autocast("cpu", dtype=dtype):
        found = model(x)
        assert found.dtype == plain(x).dtype
    assert_close(found, expected, dtype)


def test_layers_of_one_class_share_the_swapped_class():
    model = nn.Sequential(oracles.Scaled(2, 2), oracles.Scaled(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    apply_lora(model, LoRAConfig(targets="all"))
    assert type(model[0]) is type(model[1]) is not type(model[2])
    assert type(model[2]) is type(model[3])


REFUSED = {
    "norm": (lambda: nn.LayerNorm(4), r"`targets` has 'layer', which names `layer`, but that is a LayerNorm"),
    "container": (lambda: nn.Sequential(nn.Linear(4, 4)), r"names `layer`, but that is a Sequential"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), r"`layer` computes its weight"),
    "lazy": (lambda: nn.LazyLinear(4), r"`layer` has no shape yet .*run one batch"),
    "complex": (lambda: nn.Linear(4, 4).to(torch.complex64), r"`layer` has a weight of torch.complex64"),
    "integer": (lambda: integer_linear(), r"`layer` has a weight of torch.int8"),
    "own-forward": (lambda: with_own_forward(nn.Linear(4, 4)), r"`layer` has a `forward` set on the instance"),
    "own-lora": (lambda: with_attribute_lora(nn.Linear(4, 4)), r"`layer` has an attribute `lora` of its own"),
}


def integer_linear():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: F.linear(x, layer.weight)
    return layer


def with_attribute_lora(layer):
    layer.lora = "mine"
    return layer


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_adapted_are_refused_by_name_and_nothing_changes(case):
    make, words = REFUSED[case]
    model = nn.Sequential()
    model.add_module("fine", nn.Linear(4, 4))
    model.add_module("layer", make())
    with pytest.raises(ValueError, match=words):
        apply_lora(model, LoRAConfig(targets=["layer", "fine"]))
    assert type(model.fine) is nn.Linear
    assert model.fine.weight.requires_grad
    assert not [name for name, _ in model.named_modules() if "lora" in name]


@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d", "conv2d-no-bias", "conv1d", "conv3d", "hf-conv1d"])
def test_peft_gives_the_same_output_and_merged_weight(case):
    peft = pytest.importorskip("peft")
    plain, model, x = trained(case)
    inside = nn.Sequential()
    inside.add_module("layer", copy.deepcopy(plain))
    config = peft.LoraConfig(
        r=3, lora_alpha=3 * SCALE, target_modules=["layer"], fan_in_fan_out=type(plain).__name__ == "Conv1D"
    )
    other = peft.get_peft_model(inside, config)
    give_to_peft(other.base_model.model.layer, model.layer.lora.default, model.layer.weight)
    assert_close(model(x), other(x), torch.float32)
    merge_lora(model)
    assert_close(model.layer.weight, other.merge_and_unload().layer.weight, torch.float32)


def give_to_peft(layer, adapter, weight):
    if "default" in layer.lora_embedding_A:
        layer.lora_embedding_A["default"].data.copy_(adapter.A.data)
        layer.lora_embedding_B["default"].data.copy_(adapter.B.data)
        return
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data.copy_(adapter.A.data.view(A.shape))
    B.data.copy_(adapter.B.data.view(B.shape))
