"""nn.MultiheadAttention: adapters on q, k, v and out_proj against the plain layer with the product in its weights."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora
from tests.helpers import oracles
from tests.helpers.layer_cases.attention import CASES, EACH_HEAD, NO_WEIGHTS, TARGETS, WIDTH, case
from tests.helpers.oracles import SCALE, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor is True")
MATRICES = ["q", "k", "v", "out_proj"]
MODES = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "train-no-grad": (True, torch.no_grad),
    "eval-no-grad": (False, torch.no_grad),
    "eval-inference": (False, torch.inference_mode),
}


every_mode = pytest.mark.parametrize("mode", MODES)


def build(make):
    """The plain layer, inputs and other arguments, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return (CASES[make] if isinstance(make, str) else make)()


def adapt(layer, targets=("attn",), compute="auto", **arguments):
    """A model around a copy of ``layer`` with adapters whose B is zero."""
    model = nn.ModuleDict({"attn": copy.deepcopy(layer)})
    apply_lora(model, LoRAConfig(r=2, alpha=2 * SCALE, targets=targets, **arguments), compute=compute)
    return model


def train_by_hand(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(name, targets=("attn",), **arguments):
    layer, inputs, others = build(name)
    return layer, train_by_hand(adapt(layer, targets, **arguments)), inputs, others


def call(layer, mode, inputs, others):
    training, context = MODES[mode]
    with context():
        return layer.train(training)(*inputs, **others)


def pairs_in(layer):
    """Every pair of an adapted layer by what it adapts."""
    found = {} if "default" not in layer.lora else {part: layer.lora.default[part] for part in layer.lora.default}
    return found | ({"out_proj": layer.out_proj.lora.default} if hasattr(layer.out_proj, "lora") else {})


def values_of(layer):
    """The same as leaves of their own, in fp64."""
    pairs = pairs_in(layer).items()
    return {name: [m.detach().double().requires_grad_() for m in (pair.A, pair.B)] for name, pair in pairs}


def summed(plain, values):
    """The parameters of the plain layer in fp64 that have ``W + scale * B A``."""
    delta = {name: SCALE * B @ A for name, (A, B) in values.items()}
    total = {"out_proj.weight": plain.out_proj.weight.detach().double() + delta.get("out_proj", 0)}
    if plain.in_proj_weight is None:
        for part in "qkv":
            weight = getattr(plain, f"{part}_proj_weight").detach().double()
            total[f"{part}_proj_weight"] = weight + delta.get(part, 0)
        return total
    nothing = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    rows = torch.cat([delta.get(part, nothing) for part in "qkv"])  # rows 0:E, E:2E, 2E:3E of one parameter
    return total | {"in_proj_weight": plain.in_proj_weight.detach().double() + rows}


def expected(plain, values, inputs, others, training=True):
    """What the plain layer gives in fp64 with the product added to its weights."""
    twin = copy.deepcopy(plain).double().train(training)
    double = {id(x): x.double() for x in inputs}
    masks = {
        key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in others.items()
    }
    return functional_call(twin, summed(plain, values), tuple(double[id(x)] for x in inputs), masks)


def assert_same_bits(found, other):
    assert same_bits(found[0], other[0])
    assert (found[1] is None) == (other[1] is None)
    assert found[1] is None or same_bits(found[1], other[1])


def assert_close(found, other, tolerance=1e-5):
    assert (found[1] is None) == (other[1] is None)
    for one, two in zip(found, other, strict=True):
        if one is not None:
            assert one.shape == two.shape
            error = (one.detach().double() - two.detach().double()).abs().max() / two.detach().abs().max().double()
            assert error < tolerance, f"off by {error:.1e} of the largest value"


UNGRADED = ("train-no-grad", "eval-no-grad", "eval-inference")


def start_is_the_same(plain, inputs, others, modes, targets=("attn",)):
    layer = adapt(plain, targets)["attn"]
    assert all(pair.A.any() and not pair.B.any() for pair in pairs_in(layer).values())
    for mode in modes:
        assert_same_bits(call(layer, mode, inputs, others), call(plain, mode, inputs, others))


def but(apart, *name):
    """The modes in which the start of a case has the plain layer's last bits."""
    return [mode for mode in MODES if (*name, mode) not in apart]


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("attn", MATRICES),
        ("qv", ["q", "v"]),
        (["attn"], MATRICES),
        (["attn.q"], ["q"]),
        (["k", "out_proj"], ["k", "out_proj"]),
        (["attn.out_proj"], ["out_proj"]),
        (["re:attn\\.[kv]"], ["k", "v"]),
    ],
)
@pytest.mark.parametrize("name", ["self-batch-first-no-weights", "kdim"])
def test_some_of_the_matrices_can_be_adapted(name, targets, parts):
    plain, model, inputs, others = trained(name, targets)
    assert sorted(pairs_in(model["attn"])) == sorted(parts)
    wanted = expected(plain, values_of(model["attn"]), inputs, others)
    for mode in MODES:
        assert_close(call(model["attn"], mode, inputs, others), wanted)
    merge_lora(model)
    assert_close(call(model["attn"], "eval-no-grad", inputs, others), wanted)


PARTIAL = {"qv": "qv", "q": ["attn.q"], "k and out_proj": ["k", "out_proj"], "out_proj": ["attn.out_proj"]}
PARTLY_APART = {  # a weight without an adapter asks for no gradient, and torch makes another product of it
    ("self-batch-first-no-weights", "out_proj", "train-no-grad"),
    *(("kdim", which, mode) for which in ("q", "out_proj") for mode in UNGRADED),
    *(("kdim-memory", which, mode) for which in ("q", "out_proj") for mode in UNGRADED),
}


@pytest.mark.parametrize("which", PARTIAL)
@pytest.mark.parametrize("name", ["self-batch-first-no-weights", "memory", "kdim"])
def test_start_with_some_matrices_adapted_is_the_plain_layers_bit_for_bit(name, which):
    start_is_the_same(*build(name), but(PARTLY_APART, name, which), PARTIAL[which])


@pytest.mark.parametrize(("name", "which", "mode"), sorted(PARTLY_APART))
def test_start_with_some_matrices_adapted_is_the_plain_layers_but_for_the_last_bits(name, which, mode):
    plain, inputs, others = build(name)
    layer = adapt(plain, PARTIAL[which])["attn"]
    assert_close(call(layer, mode, inputs, others), call(plain, mode, inputs, others), 1e-6)


def test_query_and_value_leave_the_rows_of_the_key_untouched():
    plain, model, _, _ = trained("self", "qv")
    merge_lora(model)
    before, after = plain.in_proj_weight.split(WIDTH), model["attn"].in_proj_weight.split(WIDTH)
    assert [same_bits(*rows) for rows in zip(before, after, strict=True)] == [False, True, False]
    assert same_bits(model["attn"].out_proj.weight, plain.out_proj.weight)


DROPPED = {
    "weights": case("memory", dropout=0.5),
    "no-weights": case("memory", dropout=0.5, call=NO_WEIGHTS),
    "batch-first": case("three", dropout=0.3, batch_first=True, padding="bool", call=NO_WEIGHTS),
    "self": case(dropout=0.3, batch_first=True, call=EACH_HEAD),
    "self-masked": case(dropout=0.3, pairs="bool-3d", call=NO_WEIGHTS),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_of_the_attention_draws_as_in_the_plain_layer(name):
    plain, inputs, others = build(DROPPED[name])
    layer = adapt(plain)["attn"]
    for mode in ("train", "train-no-grad"):
        torch.manual_seed(5)
        wanted, state = call(plain, mode, inputs, others), torch.get_rng_state()
        torch.manual_seed(5)
        assert_same_bits(call(layer, mode, inputs, others), wanted)
        assert torch.equal(torch.get_rng_state(), state)
    assert not same_bits(wanted[0], call(plain, "eval", inputs, others)[0])


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_of_the_attention_acts_on_the_sum(name):
    plain, model, inputs, others = trained(DROPPED[name])
    weights = {key: total.float() for key, total in summed(plain, values_of(model["attn"])).items()}
    torch.manual_seed(5)
    wanted = functional_call(plain, weights, tuple(inputs), others)
    torch.manual_seed(5)
    assert_close(model["attn"](*inputs, **others), wanted)
    for mode in ("eval", "eval-no-grad"):
        found = call(model["attn"], mode, inputs, others)
        assert_close(found, expected(plain, values_of(model["attn"]), inputs, others, training=False))


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("name", ["self", "memory", "kdim"])
def test_dropout_of_the_adapters_drops_the_input_of_each_in_training(name, context):
    plain, model, inputs, others = trained(name, dropout=0.5)
    layer = model["attn"]
    torch.manual_seed(5)
    with context():
        found = layer(*inputs, need_weights=False)[0]
    torch.manual_seed(5)
    terms = {part: term(pair, F.dropout(x, 0.5)) for x, (part, pair) in zip(inputs, qkv_pairs(layer), strict=True)}
    heads = [split(F.linear(x, *frozen(plain, part)) + terms[part]) for x, part in zip(inputs, "qkv", strict=True)]
    inner = F.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).reshape(TARGETS * 3, WIDTH)
    wanted = plain.out_proj(inner) + term(layer.out_proj.lora.default, F.dropout(inner, 0.5))
    assert_close([found.view(-1, WIDTH), None], [wanted, None])
    for mode in ("eval", "eval-no-grad"):
        assert_close(call(layer, mode, inputs, others), expected(plain, values_of(layer), inputs, others))


def qkv_pairs(layer):
    return [(part, layer.lora.default[part]) for part in "qkv"]


def term(pair, x):
    return SCALE * x @ pair.A.t() @ pair.B.t()


def frozen(plain, part):
    """Weight and bias of one of the three maps."""
    index = "qkv".index(part)
    weight = getattr(plain, f"{part}_proj_weight")
    weight = weight if weight is not None else plain.in_proj_weight[index * WIDTH : (index + 1) * WIDTH]
    return weight, plain.in_proj_bias[index * WIDTH : (index + 1) * WIDTH]


def split(x):
    """``(length, 3, WIDTH)`` as ``(3, 2 heads, length, WIDTH / 2)``."""
    return x.view(len(x), 3, 2, WIDTH // 2).permute(1, 2, 0, 3)


def to_dtype(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def in_dtype(name, dtype, **arguments):
    plain, inputs, others = build(name)
    cast = {id(x): x.to(dtype) for x in inputs}
    others = {key: to_dtype(value, dtype) for key, value in others.items()}
    return plain.to(dtype), [cast[id(x)] for x in inputs], others


DTYPE_CASES = ["self-batch-first", "self-padding-no-weights", "self-pairs-float", "memory", "three-no-weights", "kdim"]


DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16}
BATCH_FIRST = ("self-batch-first", "self-padding-no-weights")
HALF_APART = {  # torch's kernel for inference takes weights only, and the sum would lose small deltas
    (name, "bf16", mode) for name in BATCH_FIRST for mode in ("eval-no-grad", "eval-inference")
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DTYPE_CASES)
def test_start_in_other_dtypes_is_the_plain_layers_bit_for_bit(name, dtype):
    start_is_the_same(*in_dtype(name, DTYPES[dtype]), but(HALF_APART, name, dtype))


@pytest.mark.parametrize(("name", "dtype", "mode"), sorted(HALF_APART))
def test_start_in_half_precision_is_that_of_torchs_kernel_but_for_rounding(name, dtype, mode):
    plain, inputs, others = in_dtype(name, DTYPES[dtype])
    layer = adapt(plain)["attn"]
    assert_close(call(layer, mode, inputs, others), call(plain, mode, inputs, others), 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", DTYPE_CASES)
def test_other_dtypes_give_the_sum_and_keep_adapters_in_fp32(name, dtype, tolerance):
    plain, inputs, others = in_dtype(name, dtype)
    model = train_by_hand(adapt(plain))
    layer = model["attn"]
    wanted = expected(plain, values_of(layer), inputs, others)
    for mode in MODES:
        found = call(layer, mode, inputs, others)
        assert found[0].dtype == dtype
        assert_close(found, wanted, tolerance)
    call(layer, "train", inputs, others)[0].square().sum().backward()
    for _, parameter in lora_parameters(model):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


@every_mode
def test_a_delta_that_rounding_to_bf16_would_lose_still_acts(mode):
    plain = nn.MultiheadAttention(64, 2, batch_first=True).bfloat16()
    plain.in_proj_weight.data = torch.tensor([1.0, -1.0]).repeat(192, 32).bfloat16()
    plain.out_proj.weight.data = torch.eye(64).bfloat16()
    x = torch.ones(2, 3, 64).bfloat16()
    layer = adapt(plain, ["attn.v"])["attn"]
    pair = layer.lora.default["v"]
    pair.A.data, pair.B.data = torch.full((2, 64), 0.001), torch.full((64, 2), 0.25)  # delta is 0.001 in every place
    assert torch.equal((plain.in_proj_weight.float() + 0.001).bfloat16(), plain.in_proj_weight)
    assert not call(plain, mode, [x] * 3, {})[0].any()
    assert_close(call(layer, mode, [x] * 3, {}), [torch.full((2, 3, 64), 0.064), torch.full((2, 3, 3), 1 / 3)], 1e-2)


AUTOCAST_CASES = ["self-batch-first", "self-pairs-float", "kdim"]


def in_autocast(layer, mode, inputs, others):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call(layer, mode, inputs, others)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "train") for name in AUTOCAST_CASES] + [(name, "eval-no-grad") for name in AUTOCAST_CASES[1:]],
)
def test_start_in_autocast_is_the_plain_layers_bit_for_bit(name, mode):
    plain, inputs, others = build(name)
    wanted = in_autocast(plain, mode, inputs, others)
    assert wanted[0].dtype == torch.bfloat16
    assert_same_bits(in_autocast(adapt(plain)["attn"], mode, inputs, others), wanted)


class MadeTensors(TorchDispatchMode):
    """Lists the shapes of tensors of ``size`` elements or more that are made, views of ``known`` ones left out."""

    def __init__(self, size, known):
        super().__init__()
        self.size, self.shapes = size, []
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [y for y in tree_leaves(result) if isinstance(y, torch.Tensor) and y.numel() >= self.size]
        self.shapes += [tuple(y.shape) for y in tensors if y.untyped_storage().data_ptr() not in self.known]
        return result


def shapes_made(layer, inputs, **others):
    with MadeTensors(layer.embed_dim**2, layer.parameters()) as made:
        layer(*inputs, **others)[0].square().sum().backward()
    return made.shapes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"kdim": 40, "vdim": 40}])
def test_training_makes_nothing_of_the_size_of_a_weight(arguments, need_weights, training):
    plain = nn.MultiheadAttention(40, 2, **arguments).train(training)
    layer = adapt(plain)["attn"]
    x = torch.randn(3, 2, 40)
    assert shapes_made(layer, [x, x, x], need_weights=need_weights) == []
    assert layer.in_proj_weight is None or layer.in_proj_weight.grad is None
    assert (40, 40) in shapes_made(plain, [x, x, x], need_weights=need_weights)  # what is looked for can be found


WRONG_MASKS = {
    "pairs": ({"attn_mask": torch.zeros(TARGETS, TARGETS + 1, dtype=torch.bool)}, "attn_mask"),
    "pairs-one-row": ({"attn_mask": torch.zeros(1, TARGETS, dtype=torch.bool)}, "attn_mask"),
    "pairs-for-each-head": ({"attn_mask": torch.zeros(5, TARGETS, TARGETS)}, "attn_mask"),
    "pairs-for-each-batch": ({"attn_mask": torch.zeros(3, TARGETS, TARGETS)}, "attn_mask"),
    "pairs-four": ({"attn_mask": torch.zeros(3, 2, TARGETS, TARGETS)}, "attn_mask|mask"),
    "padding": ({"key_padding_mask": torch.zeros(3, TARGETS + 1, dtype=torch.bool)}, "key_padd"),
    "padding-turned": ({"key_padding_mask": torch.zeros(TARGETS, 3, dtype=torch.bool)}, "key_padd"),
    "padding-one": ({"key_padding_mask": torch.zeros(TARGETS, dtype=torch.bool)}, "key_padd"),
    "integers": ({"attn_mask": torch.zeros(TARGETS, TARGETS, dtype=torch.int64)}, "mask"),
    "causal-alone": ({"is_causal": True}, "attn_mask"),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_wrong_masks_raise(wrong, need_weights):
    plain, model, inputs, _ = trained("self")
    others, words = WRONG_MASKS[wrong]
    for mode in MODES:
        with pytest.raises((RuntimeError, AssertionError)):
            call(plain, mode, inputs, others | {"need_weights": need_weights})
        with pytest.raises((RuntimeError, AssertionError), match=words):
            call(model["attn"], mode, inputs, others | {"need_weights": need_weights})
    assert model["attn"].in_proj_weight.shape == plain.in_proj_weight.shape
    assert isinstance(model["attn"].in_proj_weight, nn.Parameter)


@pytest.mark.parametrize("mode", ["train", "eval-no-grad"])
def test_wrong_widths_and_lengths_raise_and_the_weights_are_back(mode):
    _, model, (x, _, _), _ = trained("self")
    layer, weight = model["attn"], model["attn"].in_proj_weight
    for inputs in ([x[..., :5]] * 3, [x, x[:2], x[:3]], [x, x[:, :2], x[:, :2]]):
        with pytest.raises((RuntimeError, AssertionError)):
            call(layer, mode, inputs, {})
        assert layer.in_proj_weight is weight
        assert layer.lora.enabled


@every_mode
@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_that_may_attend_to_nothing_are_nan_where_they_are_in_the_plain_layer(mode, need_weights):
    plain, model, inputs, _ = trained("self-batch-first")
    others = {"key_padding_mask": torch.tensor([[False] * 4, [True] * 4, [False] * 4]), "need_weights": need_weights}
    found, wanted = call(model["attn"], mode, inputs, others)[0], call(plain, mode, inputs, others)[0]
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("shape", [(0, TARGETS, WIDTH), (3, 0, WIDTH)])
@every_mode
def test_empty_inputs_give_empty_outputs(shape, need_weights, mode):
    plain, model, _, _ = trained("self-batch-first")
    x = torch.randn(shape)
    try:
        wanted = call(plain, mode, [x] * 3, {"need_weights": need_weights})
    except RuntimeError:
        pytest.skip("the plain layer does not take this either")
    found = call(model["attn"], mode, [x] * 3, {"need_weights": need_weights})
    assert found[0].shape == wanted[0].shape
    assert found[1] is None if wanted[1] is None else found[1].shape == wanted[1].shape


class Doubled(nn.MultiheadAttention):
    """Does something to what the forward that it inherits gives."""

    def forward(self, query, key, value, **arguments):
        output, weights = super().forward(query, key, value, **arguments)
        return 2 * output + 1, weights


class OneHead(nn.MultiheadAttention):
    """Reads its weights itself, those of out_proj too."""

    def forward(self, query, key, value, need_weights=True):
        q, k, v = (F.linear(x, w) for x, w in zip((query, key, value), self.in_proj_weight.chunk(3), strict=True))
        weights = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(-1)
        output = F.linear((weights @ v.transpose(0, 1)).transpose(0, 1), self.out_proj.weight, self.out_proj.bias)
        return output, weights if need_weights else None


SUBCLASSES = {
    "super": lambda: subclass(Doubled, batch_first=True),
    "super-no-weights": lambda: subclass(Doubled, batch_first=True, need_weights=False),
    "own": lambda: subclass(OneHead),
}


def subclass(cls, need_weights=True, **arguments):
    layer = cls(WIDTH, 2, **arguments)
    nn.init.normal_(layer.in_proj_bias, std=0.3)
    x = torch.randn(3, TARGETS, WIDTH)
    return layer, [x, x, x], {"need_weights": need_weights}


@pytest.mark.parametrize("name", SUBCLASSES)
@pytest.mark.parametrize("targets", [["attn"], ["attn.q"], "qv", ["k", "out_proj"], ["attn.out_proj"]], ids=str)
def test_subclasses_give_what_they_would_with_the_sum_in_their_weights(name, targets):
    plain, inputs, others = build(SUBCLASSES[name])
    model = adapt(plain, targets)
    layer = model["attn"]
    for mode in MODES:
        assert_close(call(layer, mode, inputs, others), call(plain, mode, inputs, others), 1e-6)
    wanted = expected(plain, values_of(train_by_hand(model)["attn"]), inputs, others)
    for mode in MODES:
        assert_close(call(layer, mode, inputs, others), wanted)
    merge_lora(model)
    assert type(layer) is type(plain)
    assert_close(call(layer, "eval-no-grad", inputs, others), wanted)


@pytest.mark.parametrize("mode", ["train", "eval", "train-no-grad", "eval-no-grad"])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_start_as_they_were_bit_for_bit(name, mode):
    plain, inputs, others = build(SUBCLASSES[name])
    assert_same_bits(call(adapt(plain)["attn"], mode, inputs, others), call(plain, mode, inputs, others))


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_get_the_gradients_and_can_be_copied(name):
    plain, inputs, others = build(SUBCLASSES[name])
    model = train_by_hand(adapt(plain))
    layer = model["attn"]
    values = values_of(layer)
    expected(plain, values, inputs, others)[0].square().sum().backward()
    output = layer(*inputs, **others)[0]
    output.square().sum().backward()
    for part, pair in pairs_in(layer).items():
        for matrix, leaf in zip((pair.A, pair.B), values[part], strict=True):
            assert_close([matrix.grad, None], [leaf.grad, None], 2e-5)
    assert not any(parameter.grad is not None for parameter in model.parameters() if not parameter.requires_grad)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert same_bits(other["attn"](*inputs, **others)[0], output)


def test_dropout_is_refused_where_a_subclass_reads_its_weights():
    plain, _, _ = build(SUBCLASSES["own"])
    with pytest.raises(ValueError, match=r"`attn` .*has code that reads its weight, where `dropout=0.5` cannot act"):
        adapt(plain, dropout=0.5)


@pytest.mark.parametrize("name", ["self-batch-first-no-weights", "self-padding", "self-no-bias", "self-three-heads"])
def test_peft_gives_the_same_output_gradients_and_merged_weights(name):
    peft = pytest.importorskip("peft")
    plain, model, inputs, others = trained(name)
    layer = model["attn"]
    share_a(layer)
    layer.out_proj.lora.default.B.data.zero_()  # PEFT 0.21 adds this delta twice
    config = peft.LoraConfig(r=2, lora_alpha=2 * SCALE, target_modules=["attn"])
    other = peft.get_peft_model(nn.ModuleDict({"attn": copy.deepcopy(plain)}), config).base_model.model["attn"]
    give_to_peft(other, layer)
    found, wanted = layer(*inputs, **others), other(*inputs, **others)
    assert_close(found, wanted)
    found[0].square().sum().backward()
    wanted[0].square().sum().backward()
    pairs = [layer.lora.default[part] for part in "qkv"]
    stacked = torch.cat([pair.B.grad for pair in pairs])
    assert_close([stacked, None], [other.lora_B["default"].weight.grad, None], 2e-5)
    assert_close([sum(pair.A.grad for pair in pairs), None], [other.lora_A["default"].weight.grad, None], 2e-5)
    merge_lora(model)
    other.merge()
    merged = other.get_base_layer()
    assert_close([layer.in_proj_weight, layer.out_proj.weight], [merged.in_proj_weight, merged.out_proj.weight], 1e-6)


def share_a(layer):
    """One A for q, k and v, as PEFT has it."""
    for part in "kv":
        layer.lora.default[part].A.data.copy_(layer.lora.default["q"].A.data)


def give_to_peft(other, layer):
    other.lora_A["default"].weight.data.copy_(layer.lora.default["q"].A.data)
    other.lora_B["default"].weight.data.copy_(torch.cat([layer.lora.default[part].B.data for part in "qkv"]))
    out_proj = other.get_base_layer().out_proj
    out_proj.lora_A["default"].weight.data.copy_(layer.out_proj.lora.default.A.data)
    out_proj.lora_B["default"].weight.data.copy_(layer.out_proj.lora.default.B.data)


class AroundAttention(nn.Module):
    """Attention in a model, with all that comes around it."""

    def __init__(self, attn, others):
        super().__init__()
        self.attn, self.others, self.norm = attn, others, nn.LayerNorm(WIDTH)

    def forward(self, query, key, value):
        output, weights = self.attn(query, key, value, **self.others)
        return self.norm(query + output), weights


def compiled_block(name):
    plain, inputs, others = build(name)
    block = AroundAttention(plain, others)
    apply_lora(block, LoRAConfig(r=2, alpha=2 * SCALE, targets="attn"))
    train_by_hand(block)
    torch._dynamo.reset()
    return block, torch.compile(block, backend="aot_eager", fullgraph=True), inputs


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param("self-both-masks-no-weights", True, marks=pytest.mark.slow),
        pytest.param("kdim", True, marks=pytest.mark.slow),
        ("memory", False),
    ],
)
def test_compiled_whole_gives_the_same_outputs_and_gradients(name, training):
    block, compiled, inputs = compiled_block(name)
    block.train(training)
    wanted = block(*inputs)
    wanted[0].square().sum().backward()
    gradients = [parameter.grad for _, parameter in lora_parameters(block)]
    block.zero_grad()
    found = compiled(*inputs)
    found[0].square().sum().backward()
    assert_close(found, wanted)
    for (_, parameter), gradient in zip(lora_parameters(block), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "context"), [("self-batch-first", torch.no_grad), ("kdim", torch.inference_mode)])
def test_compiled_whole_without_gradients_gives_the_same_outputs(name, context):
    block, compiled, inputs = compiled_block(name)
    block.eval()
    own = [parameter for parameter in block.attn._parameters.values() if parameter is not None]
    with context():
        for _ in range(2):
            assert_close(compiled(*inputs), block(*inputs))
    assert all(isinstance(parameter, nn.Parameter) for parameter in own)
    assert [parameter for parameter in block.attn._parameters.values() if parameter is not None] == own


def test_sizes_may_be_numbers_of_numpy():
    layer, x = nn.MultiheadAttention(np.int64(8), np.int64(2)), torch.randn(3, 2, 8)
    model = nn.ModuleDict({"attn": layer})
    before = layer(x, x, x)[0]
    apply_lora(model, LoRAConfig(r=2, targets="attn"))
    oracles.assert_close(layer(x, x, x)[0], before, torch.float32)
    oracles.train_by_hand(model)
    trained = layer(x, x, x)[0]
    merge_lora(model)
    oracles.assert_close(layer(x, x, x)[0], trained, torch.float32)


# On the weight's side.

WEIGHTS = {"compute": "weights"}


@pytest.fixture
def by_torch(monkeypatch):
    """The calls of torch's own function for attention."""
    calls, plain = [], F.multi_head_attention_forward

    def counted(*arguments, **others):
        calls.append(1)
        return plain(*arguments, **others)

    monkeypatch.setattr(F, "multi_head_attention_forward", counted)
    return calls


@pytest.mark.parametrize("name", CASES)
def test_sums_give_the_values_and_the_gradients_of_the_formula_in_fp64(name, by_torch):
    plain, model, inputs, others = trained(name, **WEIGHTS)
    layer, values = model["attn"], values_of(model["attn"])
    wanted = expected(plain, values, inputs, others)
    by_torch.clear()
    for mode in ("train", "eval"):
        output = call(layer, mode, inputs, others)
        assert_close(output, wanted)
    assert len(by_torch) == 2
    for each in (output, wanted):
        sum(y.square().sum() for y in each if y is not None).backward()
    for part, pair in pairs_in(layer).items():
        for present, exact in zip((pair.A.grad, pair.B.grad), values[part], strict=True):
            oracles.assert_close(present, exact.grad, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_sums_with_b_zero_give_the_bits_of_the_plain_layer(name):
    plain, inputs, others = build(name)
    layer = adapt(plain, **WEIGHTS)["attn"]
    for mode in ("train", "eval"):
        assert_same_bits(call(layer, mode, inputs, others), call(plain, mode, inputs, others))


@pytest.mark.parametrize("name", DROPPED)
def test_sums_draw_the_dropout_of_the_attention_as_the_plain_layer(name):
    plain, inputs, others = build(DROPPED[name])
    layer = adapt(plain, **WEIGHTS)["attn"]
    torch.manual_seed(5)
    wanted, state = call(plain, "train", inputs, others), torch.get_rng_state()
    torch.manual_seed(5)
    assert_same_bits(call(layer, "train", inputs, others), wanted)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", PARTIAL)
@pytest.mark.parametrize("name", ["self-batch-first-no-weights", "memory", "kdim"])
def test_sums_of_some_matrices_and_the_frozen_others(name, which):
    plain, model, inputs, others = trained(name, PARTIAL[which], **WEIGHTS)
    layer, values = model["attn"], values_of(model["attn"])
    output, wanted = call(layer, "train", inputs, others), expected(plain, values, inputs, others)
    assert_close(output, wanted)
    output[0].square().sum().backward()
    wanted[0].square().sum().backward()
    for part, pair in pairs_in(layer).items():
        for present, exact in zip((pair.A.grad, pair.B.grad), values[part], strict=True):
            oracles.assert_close(present, exact.grad, torch.float32)


def hooked(layer):
    seen = []
    layer.out_proj.register_forward_hook(lambda *_: seen.append(1))
    return seen


def wrapped_forward(layer):
    seen, plain = [], layer.out_proj.forward
    layer.out_proj.forward = lambda x: (seen.append(1), plain(x))[1]
    return seen


@pytest.mark.parametrize("watch", [hooked, wrapped_forward])
def test_an_output_projection_that_something_watches_is_called(watch, by_torch):
    plain, model, inputs, others = trained("self", **WEIGHTS)
    layer, seen = model["attn"], watch(model["attn"])
    wanted = expected(plain, values_of(layer), inputs, others)
    by_torch.clear()
    assert_close(layer(*inputs, **others), wanted)
    assert seen and not by_torch


class Doubling(nn.Linear):
    """Another output projection than torch's."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_output_projection_of_the_users_is_called():
    plain, inputs, others = build("self")
    plain.out_proj = Doubling(WIDTH, WIDTH)
    model = train_by_hand(adapt(plain, "qv", **WEIGHTS))
    halved = copy.deepcopy(plain)
    halved.out_proj = nn.Linear(WIDTH, WIDTH)
    halved.out_proj.load_state_dict({key: 2 * value for key, value in plain.out_proj.state_dict().items()})
    assert_close(model["attn"](*inputs, **others), expected(halved, values_of(model["attn"]), inputs, others))


def test_dropout_of_one_projections_adapter_leaves_the_sum_of_the_others(by_torch):
    plain, model, inputs, others = trained("self", **WEIGHTS)
    layer = model["attn"]
    layer.out_proj.lora.default.dropout = 0.5
    with torch.no_grad():
        layer.out_proj.lora.default.B.zero_()  # nothing is left of what is dropped
    wanted = expected(plain, values_of(layer), inputs, others)
    by_torch.clear()
    assert_close(layer(*inputs, **others), wanted)
    assert not by_torch
