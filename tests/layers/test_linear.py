"""Linear layers, embeddings and convolutions: dropout, padding, `max_norm`, hooks, refusals, and peft as an oracle."""

import abc
import copy
import pickle
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora
from tests.helpers import oracles
from tests.helpers.models import OwnLinear
from tests.helpers.oracles import CASES, SCALE, adapt, as_double, assert_close, build, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Complex modules are")
PADDED = [case for case in CASES if build(case)[0].layer.__dict__.get("padding_idx") is not None]
OWN_FORWARD = [case for case in CASES if case.startswith(("standardized", "normalized", "looked-up"))]
DROPPING = [case for case in CASES if case not in OWN_FORWARD and "embedding" not in case and "scaled" not in case]


def trained(case, **arguments):
    """The plain layer, the adapted model with trained adapters, and an input."""
    model, x = build(case)
    plain = copy.deepcopy(model.layer)
    return plain, adapt(model, **arguments), x


# B's gradient is no row of an embedding, so `scale_grad_by_freq` scales only A's.
def test_gradient_of_a_is_scaled_by_frequency_as_a_row_of_the_embedding():
    model, index = build("embedding-by-frequency")
    adapter = adapt(model).layer.lora.default
    model(index).sum().backward()
    one_use = SCALE * adapter.B.detach().sum(0)  # of an index that is used once
    used = sorted(set(index.flatten().tolist()))
    assert_close(adapter.A.grad[:, used], one_use[:, None].expand(-1, len(used)), torch.float32)


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


class WithBias(OwnLinear):
    """Inherits the forward."""


class NotQuite(OwnLinear):
    """Computes something else of its weight."""

    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize("make", [OwnLinear, WithBias])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_the_users_is_adapted_as_one(make, bias):
    layer, x = make(4, 3, bias), torch.randn(2, 4)
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "lin": layer})
    plain, before = copy.deepcopy(layer), layer(x)
    assert apply_lora(model, LoRAConfig(r=2, alpha=4, targets="all")) == ["hidden", "lin"]
    assert isinstance(layer, make) and same_bits(layer(x), before)
    oracles.train_by_hand(model)
    pair = layer.lora.default
    expected = x @ (plain.weight + 2 * pair.B @ pair.A).T + (plain.bias if bias else 0)
    assert_close(layer(x), expected, torch.float32)
    assert_close(layer(x=x), expected, torch.float32)
    merge_lora(model)
    assert type(layer) is make
    assert_close(layer(x), expected, torch.float32)


def test_one_that_computes_something_else_is_adapted_by_its_parameter_alone():
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "lin": NotQuite(4, 3)})
    assert apply_lora(copy.deepcopy(model), LoRAConfig(targets="all")) == ["hidden"]
    with pytest.raises(ValueError, match=r"'lin', which names `lin`, but that is a NotQuite"):
        apply_lora(copy.deepcopy(model), LoRAConfig(targets=["lin"]))
    assert apply_lora(model, LoRAConfig(targets=["lin.weight"])) == ["lin"]


class Runs(Protocol):
    def forward(self, input): ...


class Slotted:
    __slots__ = ()


class AbstractFirst(abc.ABC, nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class AbstractFirstOnTheWeight(abc.ABC, nn.Linear):
    def forward(self, input):
        return F.linear(input, 2 * self.weight, self.bias)


class GenericFirst(Generic[TypeVar("T")], nn.Linear):
    pass


class ProtocolFirst(Runs, nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class SlottedFirst(Slotted, nn.Linear):
    pass


class BelowAbstractFirst(AbstractFirst):
    pass


class NamesItsBase(nn.Linear):
    def forward(self, input):
        return 2 * nn.Linear.forward(self, input)


FIRST_BASES = [AbstractFirst, AbstractFirstOnTheWeight, GenericFirst, ProtocolFirst, SlottedFirst, BelowAbstractFirst]


@pytest.mark.parametrize("cls", [*FIRST_BASES, NamesItsBase])
def test_a_class_whose_first_base_is_no_module_or_that_names_its_base(cls):
    torch.manual_seed(0)
    layer, x = cls(4, 3), torch.randn(2, 4)
    base = layer(x)
    apply_lora(layer, LoRAConfig(r=2, targets="all"))
    assert isinstance(layer, cls)
    oracles.train_by_hand(layer)
    adapter, factor = layer.lora.default, 1 if cls in (GenericFirst, ProtocolFirst, SlottedFirst) else 2
    delta = adapter.B.detach().double() @ adapter.A.detach().double()
    expected = base.double() + factor * adapter.scale * x.double() @ delta.T
    assert_close(layer(x), expected, torch.float32)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(twin, cls)
        assert same_bits(twin(x), layer(x))
    merge_lora(layer)
    assert type(layer) is cls
    assert_close(layer(x), expected, torch.float32)
    remove_lora(layer)
    assert same_bits(layer(x), base)
