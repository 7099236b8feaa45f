"""Torch's own transformers: whatever path torch takes in evaluation, adapters inside act as they do in training."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import SCALE, same_bits
from tests.helpers.selection import slow_except

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested")
WIDTH, BATCH, LENGTH, MEMORY = 8, 3, 5, 4
PADDING = torch.arange(LENGTH) >= torch.tensor([[5], [3], [2]])  # True on the right of each sequence


class Model(nn.Module):
    """One of torch's transformers and what it is called with; only the places that are no padding come back."""

    def __init__(self, net, *inputs, **others):
        super().__init__()
        self.net, self.inputs, self.others = net, inputs, others

    def forward(self):
        return self.net(*self.inputs, **self.others)

    def outside_padding(self):
        output = self()
        padding = self.others.get("src_key_padding_mask", self.others.get("tgt_key_padding_mask"))
        if padding is None:
            return output
        return output[~padding] if self.batch_comes_first() else output[~padding.t()]

    def batch_comes_first(self):
        return next(m for m in self.net.modules() if isinstance(m, nn.MultiheadAttention)).batch_first


def settings(**arguments):
    return {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True} | arguments


def rows(length, batch_first=True):
    return torch.randn(BATCH, length, WIDTH) if batch_first else torch.randn(length, BATCH, WIDTH)


def encoder_layer(masked=True, **arguments):
    arguments = settings(**arguments)
    others = {"src_key_padding_mask": PADDING} if masked else {}
    return lambda: Model(nn.TransformerEncoderLayer(**arguments), rows(LENGTH, arguments["batch_first"]), **others)


def encoder(masked=True, **arguments):
    arguments = settings(**arguments)
    others = {"src_key_padding_mask": PADDING} if masked else {}

    def make():
        norm = nn.LayerNorm(WIDTH) if arguments.get("norm_first") else None
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(**arguments), 2, norm, enable_nested_tensor=True)
        return Model(net, rows(LENGTH, arguments["batch_first"]), **others)

    return make


def decoder(cls=nn.TransformerDecoderLayer, **arguments):
    arguments = settings(**arguments)
    first = arguments["batch_first"]

    def make():
        layer = nn.TransformerDecoderLayer(**arguments)
        net = layer if cls is nn.TransformerDecoderLayer else nn.TransformerDecoder(layer, 2)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return Model(net, rows(LENGTH, first), rows(MEMORY, first), tgt_mask=mask, tgt_is_causal=True)

    return make


def both(**arguments):
    arguments = settings(**arguments)

    def make():
        net = nn.Transformer(num_encoder_layers=2, num_decoder_layers=1, **arguments)
        first = arguments["batch_first"]
        others = {"memory_key_padding_mask": PADDING, "src_is_causal": False}
        model = Model(net, rows(LENGTH, first), rows(MEMORY, first), **others)
        model.others["src_key_padding_mask"] = PADDING
        model.outside_padding = model.forward  # the output is the target's, which has no padding
        return model

    return make


CASES = {
    "encoder-layer": encoder_layer(),
    "encoder-layer-unmasked": encoder_layer(masked=False),
    "encoder-layer-norm-first": encoder_layer(norm_first=True),
    "encoder-layer-gelu": encoder_layer(activation="gelu"),
    "encoder-layer-callable": encoder_layer(activation=F.silu),
    "encoder-layer-length-first": encoder_layer(batch_first=False),
    "encoder-layer-no-bias": encoder_layer(bias=False, norm_first=True),
    "encoder": encoder(),
    "encoder-unmasked": encoder(masked=False),
    "encoder-norm-first": encoder(norm_first=True),
    "encoder-gelu": encoder(activation="gelu"),
    "encoder-relu-module": encoder(activation=nn.ReLU()),
    "encoder-callable": encoder(activation=F.silu),
    "encoder-length-first": encoder(batch_first=False),
    "encoder-one-head": encoder(nhead=1),
    "decoder-layer": decoder(),
    "decoder-layer-norm-first": decoder(norm_first=True, activation="gelu"),
    "decoder-layer-length-first": decoder(batch_first=False, activation=F.silu),
    "decoder": decoder(nn.TransformerDecoder, norm_first=True),
    "transformer": both(),
    "transformer-norm-first": both(norm_first=True, activation="gelu"),
    "transformer-length-first": both(batch_first=False),
}
QUICK = ["encoder-layer", "encoder", "encoder-norm-first", "decoder-layer", "transformer"]
every_case = pytest.mark.parametrize("name", slow_except(QUICK, CASES))
whole_targets = pytest.mark.parametrize("targets", ["attn", "all"])
HOSTED = ["encoder-layer", "encoder-layer-gelu", "encoder", "encoder-norm-first", "encoder-gelu", "transformer"]
FAST = [
    "encoder-layer",
    "encoder-layer-norm-first",
    "encoder-layer-gelu",
    "encoder",
    "encoder-unmasked",
    "encoder-gelu",
]


def build(name, dtype=torch.float32):
    """The model of a case, the same every time; no parameter is zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = CASES[name]()
        for parameter in model.parameters():
            parameter.data = (parameter + 0.2 * torch.randn(parameter.shape)).detach()
    return model.to(dtype)


def adapt(model, targets="attn", **arguments):
    apply_lora(model, LoRAConfig(r=2, alpha=2 * SCALE, targets=targets, **arguments))
    return model


def train_by_hand(model, size=0.3):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model


def trained(name, targets="attn", **arguments):
    return train_by_hand(adapt(build(name), targets, **arguments))


def with_sums(plain, adapted):
    """The plain model with ``W + scale * B A`` in its weights, by the names of A and B alone."""
    model, matrices = copy.deepcopy(plain).double(), dict(lora_parameters(adapted))
    for name in [name.removesuffix(".A") for name in matrices if name.endswith(".A")]:
        owner, _, part = name.partition(".lora.default")
        delta = SCALE * matrices[f"{name}.B"].detach().double() @ matrices[f"{name}.A"].detach().double()
        if part:  # rows 0:E, E:2E, 2E:3E of in_proj_weight
            start = {".q": 0, ".k": WIDTH, ".v": 2 * WIDTH}[part]
            model.get_submodule(owner).in_proj_weight.data[start : start + WIDTH] += delta
        else:
            model.get_submodule(owner).weight.data += delta
    model.inputs = tuple(x.double() for x in model.inputs)
    model.others = {key: to_double(value) for key, value in model.others.items()}
    return model


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    error = (found.detach().double() - expected.detach().double()).abs().max() / expected.detach().abs().max().double()
    assert error < tolerance, f"off by {error:.1e} of the largest value"


def without_gradients(model):
    with torch.no_grad():
        return model.outside_padding()


class Kernels:
    """Counts what torch's fast paths call while it lasts."""

    def __init__(self, monkeypatch):
        self.layers, self.nested = 0, 0
        layer, nested = torch._transformer_encoder_layer_fwd, torch._nested_tensor_from_mask
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: self.count("layers", layer(*a)))
        monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *a, **k: self.count("nested", nested(*a, **k)))

    def count(self, what, result):
        setattr(self, what, getattr(self, what) + 1)
        return result


@pytest.mark.parametrize(
    ("name", "targets"),
    slow_except(
        [*product(CASES, ["all"]), *product(QUICK, ["attn"]), ("encoder", ["linear1"]), ("encoder", ["out_proj"])],
        [*product(CASES, ["attn", "all"]), *product(HOSTED, [["linear1"], ["out_proj"]])],
    ),
)
def test_every_way_to_run_gives_what_the_sums_give(name, targets):
    plain = build(name)
    model = train_by_hand(adapt(copy.deepcopy(plain), targets))
    expected = with_sums(plain, model).train().outside_padding()
    for training in (True, False):
        model.train(training)
        assert_close(model.outside_padding(), expected)
        assert_close(without_gradients(model), expected)
        with torch.inference_mode():
            assert_close(model.outside_padding(), expected)
    with pytest.raises(AssertionError):  # the adapters matter
        assert_close(without_gradients(plain.eval()), expected, 1e-2)


@whole_targets
@every_case
def test_start_is_the_bases_bit_for_bit_in_evaluation_and_in_training(name, targets):
    plain = build(name)
    model = adapt(copy.deepcopy(plain), targets)
    assert same_bits(model.eval()(), plain.eval()())
    with torch.no_grad():
        assert same_bits(model(), plain())
    assert same_bits(model.train()(), plain.train()())


ON_THE_FAST_PATH = ["attn", "all", ["linear1"], ["out_proj"], "qv", ["re:.*self_attn\\.k"], ["self_attn"]]


@pytest.mark.parametrize(
    ("name", "targets"),
    slow_except([*product(FAST, ["all"]), *product(["encoder"], ON_THE_FAST_PATH)], product(FAST, ON_THE_FAST_PATH)),
    ids=str,
)
def test_start_on_the_fast_path_is_the_bases_bit_for_bit(name, targets, monkeypatch):
    plain = build(name).eval()
    model, kernels = adapt(copy.deepcopy(plain), targets), Kernels(monkeypatch)
    with torch.no_grad():
        expected = plain()
        assert kernels.layers > 0
        assert same_bits(model(), expected)


@whole_targets
@every_case
def test_merged_output_equals_the_unmerged_one_and_unmerge_gives_the_bits_back(name, targets):
    model = trained(name, targets).eval()
    values, output, alone = oracles.snapshot(model), model.outside_padding(), without_gradients(model)
    merge_lora(model)
    assert_close(model.outside_padding(), output)
    assert_close(without_gradients(model), alone)
    unmerge_lora(model)
    oracles.assert_same_values(model, values)
    assert same_bits(without_gradients(model), alone)


@pytest.mark.parametrize("name", HOSTED)
def test_only_the_last_layer_adapted_acts_in_evaluation(name):
    plain = build(name)
    last = [owner for owner, module in plain.named_modules() if isinstance(module, nn.TransformerEncoderLayer)][-1]
    model = train_by_hand(adapt(copy.deepcopy(plain), [f"{last}.linear2", f"{last}.self_attn.v"]))
    expected = with_sums(plain, model).outside_padding()
    assert_close(model.train().outside_padding(), expected)
    assert_close(without_gradients(model.eval()), expected)
    assert_close(model.outside_padding(), expected)
    with pytest.raises(AssertionError):
        assert_close(without_gradients(plain.eval()), expected, 1e-2)


def attributes(modules):
    """Class and plain attributes of each of some modules."""
    own = ("activation_relu_or_gelu", "use_nested_tensor", "training", "num_layers", "enable_nested_tensor")
    return [(type(m), {key: m.__dict__[key] for key in own if key in m.__dict__}) for m in modules]


@pytest.mark.parametrize("leave", [merge_lora, remove_lora])
@pytest.mark.parametrize("targets", ["all", ["linear1"]], ids=str)
@pytest.mark.parametrize("name", ["encoder-layer", "encoder", "transformer"])
def test_types_and_attributes_are_the_originals_afterwards(name, targets, leave):
    plain = build(name).eval()
    model = copy.deepcopy(plain)
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    before = attributes(modules)
    train_by_hand(adapt(model, targets))
    without_gradients(model)
    assert [facts for _, facts in attributes(modules)] == [
        facts for _, facts in before
    ]  # while adapters are there, too
    leave(model)
    assert attributes(model.modules()) == before
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert len(parameters) == len(dict(model.named_parameters()))
    if leave is remove_lora:
        assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in plain.modules()]
        with torch.no_grad():
            assert same_bits(model(), plain())


@pytest.mark.parametrize("name", ["encoder", "encoder-norm-first", "transformer"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_alike_and_stand_alone(name, copied):
    model = trained(name, "all" if name == "encoder" else "attn").eval()
    if name == "transformer":
        del model.outside_padding  # a bound method of the original
        model.others.pop("src_key_padding_mask")
    values, output = oracles.snapshot(model), without_gradients(model)
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert attributes(other.modules()) == attributes(model.modules())
    assert same_bits(without_gradients(other), output)
    for _, parameter in lora_parameters(other):
        parameter.data.mul_(2)
    assert same_bits(without_gradients(model), output)
    remove_lora(other)
    assert not [m for m in other.modules() if "LoRA" in type(m).__name__]
    oracles.assert_same_values(model, values)


@whole_targets
@every_case
def test_evaluation_gives_gradients_to_every_a_and_b(name, targets):
    model = trained(name, targets).eval()
    mixed = torch.randn(model.outside_padding().shape, generator=torch.Generator().manual_seed(3))
    (model.outside_padding() * mixed).sum().backward()
    found = [parameter.grad.clone() for _, parameter in lora_parameters(model)]
    assert all(gradient.abs().sum() > 0 for gradient in found)
    model.zero_grad()
    (model.train().outside_padding() * mixed).sum().backward()
    for (_, parameter), gradient in zip(lora_parameters(model), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    own = {id(parameter) for _, parameter in lora_parameters(model)}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in own)


@pytest.mark.parametrize("name", ["encoder-layer", "encoder", "encoder-norm-first"])
def test_gradients_are_those_through_the_sums(name):
    plain = build(name)
    model = train_by_hand(adapt(copy.deepcopy(plain), "all"))
    oracle = with_sums(plain, model)
    model().square().sum().backward()
    oracle().square().sum().backward()
    matrices = dict(lora_parameters(model))
    whole = {key: parameter.grad for key, parameter in oracle.named_parameters()}
    for key, A in matrices.items():
        if key.endswith(".A"):
            B = matrices[f"{key[:-1]}B"]
            owner, _, part = key.removesuffix(".A").partition(".lora.default")
            rows_of = slice(*{"": (None,), ".q": (WIDTH,), ".k": (WIDTH, 2 * WIDTH), ".v": (2 * WIDTH, None)}[part])
            gradient = whole[f"{owner}.in_proj_weight" if part else f"{owner}.weight"][rows_of]
            assert_close(A.grad, SCALE * B.double().t() @ gradient, 2e-5)
            assert_close(B.grad, SCALE * gradient @ A.double().t(), 2e-5)


@pytest.mark.parametrize(("name", "nested"), [("encoder", 1), ("encoder-gelu", 1), ("encoder-unmasked", 0)])
def test_fast_paths_are_taken_where_sums_serve_and_only_there(name, nested, monkeypatch):
    model, kernels = trained(name, "all").eval(), Kernels(monkeypatch)
    without_gradients(model)
    assert (kernels.layers, kernels.nested) == (2, nested)
    model()
    model.train()
    without_gradients(model)
    assert (kernels.layers, kernels.nested) == (2, nested)


@pytest.mark.parametrize("name", ["encoder", "encoder-gelu", "encoder-layer-norm-first"])
def test_disable_gives_the_base_and_the_adapters_act_again(name):
    plain, model = build(name).eval(), trained(name, "all").eval()
    output = without_gradients(model)
    with disable_lora(model), torch.no_grad():
        assert same_bits(model(), plain())
    assert same_bits(without_gradients(model), output)


@pytest.mark.parametrize("name", ["encoder", "encoder-layer", "transformer"])
def test_parameters_are_in_their_places_after_a_forward_that_fails(name):
    model = trained(name, "all").eval()
    parameters = dict(model.named_parameters())
    fine, output = model.inputs, without_gradients(model)
    model.inputs = tuple(x[..., :-1] for x in fine)
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)):
        model()
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    model.inputs = fine
    assert same_bits(without_gradients(model), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("targets", ["attn", ["linear2"]], ids=str)
@pytest.mark.parametrize("name", ["encoder", "encoder-layer", "encoder-norm-first"])
def test_other_dtypes_give_the_sums_in_evaluation(name, targets, dtype):
    plain = build(name, dtype)
    plain.inputs = tuple(x.to(dtype) for x in plain.inputs)
    model = train_by_hand(adapt(copy.deepcopy(plain), targets))
    expected = with_sums(plain, model).outside_padding()
    tolerance = 1e-11 if dtype == torch.float64 else 5e-2
    assert_close(model.train().outside_padding(), expected, tolerance)
    assert_close(model.eval().outside_padding(), expected, tolerance)
    assert_close(without_gradients(model), expected, tolerance)
    assert {parameter.dtype for _, parameter in lora_parameters(model)} == {torch.float32}


def cancelling_layer():
    """A layer whose linear2 gets ones and gives nothing, of weights one and minus one."""
    layer = nn.TransformerEncoderLayer(**settings(dim_feedforward=64))
    layer.linear1.weight.data.zero_()
    layer.linear1.bias.data.fill_(1)
    layer.linear2.weight.data = torch.tensor([1.0, -1.0]).repeat(WIDTH, 32)
    layer.linear2.bias.data.zero_()
    return layer


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_delta_that_rounding_to_bf16_would_lose_still_acts_in_evaluation(wrapped, context):
    layer = cancelling_layer()
    net = nn.TransformerEncoder(layer, 1) if wrapped else layer
    plain = Model(net.bfloat16(), rows(LENGTH).bfloat16(), src_key_padding_mask=PADDING).eval()
    model = adapt(copy.deepcopy(plain), ["linear2"])
    adapter = next(m for m in model.modules() if hasattr(m, "lora") and len(m.lora)).lora.default
    adapter.A.data, adapter.B.data = torch.full((2, 64), 0.001), torch.zeros(WIDTH, 2)
    adapter.B.data[0] = 0.25  # delta is 0.001 in the first row: 0.064 on the first feature
    weight = next(m for m in plain.modules() if hasattr(m, "linear2")).linear2.weight
    assert torch.equal((weight.float() + 0.001).bfloat16(), weight)
    expected = model.train().outside_padding()
    with context():
        base = plain.outside_padding()
        found = model.eval().outside_padding()
    assert (expected.float() - base.float()).abs().max() > 0.02
    assert (found.float() - expected.float()).abs().max() < (found.float() - base.float()).abs().max() / 2


@pytest.mark.parametrize("name", ["encoder", "encoder-layer", "decoder-layer", "transformer"])
def test_autocast_in_evaluation_gives_the_sums(name):
    plain = build(name)
    model = train_by_hand(adapt(copy.deepcopy(plain), "all")).eval()
    expected = with_sums(plain, model).outside_padding()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model.outside_padding(), expected, 5e-2)
        assert_close(without_gradients(model), expected, 5e-2)


def test_dropout_of_the_adapters_acts_in_training_alone():
    model = trained("encoder", "all", dropout=0.5)
    torch.manual_seed(0)
    first, second = model.outside_padding(), model.outside_padding()
    assert not torch.allclose(first, second)
    expected = with_sums(build("encoder"), model).outside_padding()
    assert_close(without_gradients(model.eval()), expected)
    assert_close(model.outside_padding(), expected)


def test_adapters_in_training_drop_also_where_the_rest_is_in_evaluation():
    model = trained("encoder", "all", dropout=0.5).eval()
    expected = without_gradients(model)
    for module in model.modules():
        if hasattr(module, "lora"):
            module.lora.train()
    torch.manual_seed(0)
    assert not torch.allclose(without_gradients(model), expected)


def test_hooks_inside_are_called_in_evaluation():
    model, seen = trained("encoder", ["linear2"]).eval(), []
    model.net.layers[0].linear1.register_forward_hook(lambda module, args, output: seen.append(output))
    without_gradients(model)
    assert len(seen) == 1


class Loud(nn.TransformerEncoderLayer):
    """A user's layer that hands on."""

    def forward(self, src, *args, **kwargs):
        return 2 * super().forward(src, *args, **kwargs)


@pytest.mark.parametrize("targets", ["attn", "all", ["linear1"]], ids=str)
def test_a_subclass_of_the_layer_acts_in_evaluation_as_in_training(targets):
    torch.manual_seed(0)
    plain = Model(Loud(**settings()), rows(LENGTH), src_key_padding_mask=PADDING)
    model = train_by_hand(adapt(copy.deepcopy(plain), targets))
    expected = with_sums(plain, model).outside_padding()
    assert_close(model.outside_padding(), expected)
    assert_close(without_gradients(model.eval()), expected)
    merge_lora(model)
    assert type(model.net) is Loud
    assert_close(without_gradients(model), expected)


def test_nested_input_of_the_user_gives_the_sums():
    plain = build("encoder-layer-unmasked").eval()
    model = train_by_hand(adapt(copy.deepcopy(plain), "all"))
    sequences = [torch.randn(length, WIDTH) for length in (5, 3, 2)]
    oracle = with_sums(plain, model)
    with torch.no_grad():
        found = model.net(torch.nested.nested_tensor(sequences)).unbind()
    for one, x in zip(found, sequences, strict=True):
        assert_close(one, oracle.net.train()(x.double()[None])[0])


def test_what_is_set_on_an_adapted_encoder_is_heeded_and_stays(monkeypatch):
    model, kernels = trained("encoder", "all").eval(), Kernels(monkeypatch)
    output = without_gradients(model)
    model.net.use_nested_tensor = False
    model.net.layers[0].activation_relu_or_gelu = 0
    assert_close(without_gradients(model), output)
    assert (kernels.nested, kernels.layers) == (1, 3)
    remove_lora(model)
    assert model.net.use_nested_tensor is False
    assert [layer.activation_relu_or_gelu for layer in model.net.layers] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grad"), [("encoder-layer", True), ("encoder-unmasked", False)])
def test_an_encoder_compiles_as_a_whole_in_evaluation(name, grad):
    model = trained(name, "all").eval()
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        expected = model.outside_padding()
        model.compile(backend="aot_eager", fullgraph=True)
        assert_close(model.outside_padding(), expected)
