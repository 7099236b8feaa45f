"""LSTM, GRU, RNN and their cells: W + scale * B A in each weight matrix, by torch's own names for them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disable_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.helpers import oracles
from tests.helpers.oracles import SCALE, same_bits

WIDTH, HIDDEN, BATCH, LENGTH = 4, 3, 3, 5


def case(cls, packed=False, state=False, unbatched=False, **arguments):
    """How to make a layer and what to call it with."""

    def make():
        layer = cls(WIDTH, HIDDEN, **arguments)
        shape = (LENGTH,) if unbatched else (BATCH, LENGTH) if layer.batch_first else (LENGTH, BATCH)
        x = torch.randn(*shape, WIDTH)
        if packed:
            x = pack_padded_sequence(x, [2, 5, 3], layer.batch_first, enforce_sorted=False)
        return layer, (x, first_state(layer, () if unbatched else (BATCH,))) if state else (x,)

    return make


def first_state(layer, batch):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    return (hidden, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else hidden


def cell(cls, **arguments):
    def make():
        hidden = torch.randn(BATCH, HIDDEN)
        state = (hidden, torch.randn(BATCH, HIDDEN)) if cls is nn.LSTMCell else hidden
        return cls(WIDTH, HIDDEN, **arguments), (torch.randn(BATCH, WIDTH), state)

    return make


class Residual(nn.GRU):
    """Does something to what the forward that it inherits gives."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return 2 * output + 1, state


class Unrolled(nn.RNN):
    """Reads its weights itself."""

    def forward(self, x):
        state, states = x.new_zeros(x.shape[1], HIDDEN), []
        for each in x:
            state = torch.tanh(each @ self.weight_ih_l0.t() + state @ self.weight_hh_l0.t() + self.bias_ih_l0)
            states.append(state)
        return torch.stack(states), state


class OwnCell(nn.GRUCell):
    """A cell that reads its weights itself."""

    def forward(self, x, state):
        return torch.tanh((x @ self.weight_ih.t() + state @ self.weight_hh.t()).chunk(3, -1)[0])


CASES = {
    "lstm": case(nn.LSTM),
    "lstm-two-layers": case(nn.LSTM, num_layers=2, state=True),
    "lstm-both-directions": case(nn.LSTM, bidirectional=True, batch_first=True, state=True),
    "lstm-projection": case(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True, state=True),
    "lstm-packed": case(nn.LSTM, packed=True, num_layers=2, bidirectional=True),
    "lstm-packed-projection": case(nn.LSTM, packed=True, proj_size=2, batch_first=True, state=True),
    "lstm-no-bias": case(nn.LSTM, bias=False),
    "lstm-unbatched": case(nn.LSTM, unbatched=True, state=True),
    "gru": case(nn.GRU),
    "gru-two-layers": case(nn.GRU, num_layers=2, bidirectional=True, batch_first=True, state=True),
    "gru-packed": case(nn.GRU, packed=True, batch_first=True, state=True),
    "gru-no-bias": case(nn.GRU, bias=False, unbatched=True),
    "rnn": case(nn.RNN),
    "rnn-relu": case(nn.RNN, nonlinearity="relu", num_layers=2, state=True),
    "rnn-packed": case(nn.RNN, packed=True, bidirectional=True, bias=False),
    "residual-gru": case(Residual, state=True),
    "unrolled-rnn": case(Unrolled),
    "lstm-cell": cell(nn.LSTMCell),
    "lstm-cell-no-bias": cell(nn.LSTMCell, bias=False),
    "gru-cell": cell(nn.GRUCell),
    "rnn-cell": cell(nn.RNNCell, nonlinearity="relu"),
    "own-cell": cell(OwnCell),
}
every_case = pytest.mark.parametrize("name", CASES)
LISTS = [name for name in CASES if "cell" not in name]


def build(name, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer.to(dtype))
    return model, cast(inputs, dtype)


def cast(value, dtype):
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(cast(each, dtype) for each in value)
    return value.to(dtype)


def adapt(model, targets=("layer",), **arguments):
    apply_lora(model, LoRAConfig(r=2, alpha=2 * SCALE, targets=targets, **arguments))
    return model


def train_by_hand(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(name, targets=("layer",), dtype=torch.float32):
    model, inputs = build(name, dtype)
    plain = copy.deepcopy(model.layer)
    return plain, train_by_hand(adapt(model, targets)), inputs


def values_of(model):
    """A and B of each matrix as leaves of their own, in fp64."""
    pairs = model.layer.lora.default
    return {key: [m.detach().double().requires_grad_() for m in (pairs[key].A, pairs[key].B)] for key in pairs}


def matrices(layer):
    return [key for key, parameter in layer.named_parameters() if parameter.dim() == 2]


def expected(plain, values, inputs):
    """What the plain layer gives in fp64 with the product added to its weights."""
    plain = copy.deepcopy(plain).double()
    sums = {key: parameter.detach() for key, parameter in plain.named_parameters()}
    sums |= {key: sums[key] + SCALE * B @ A for key, (A, B) in values.items()}
    if type(plain).__base__ is not nn.RNNBase:
        return flat(functional_call(plain, sums, cast(inputs, torch.float64)))
    plain._flat_weights = [sums[key] for key in plain._flat_weights_names]
    return flat(plain(*cast(inputs, torch.float64)))


def flat(outputs):
    """Every tensor in what a recurrent layer gives."""
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    return [outputs] if isinstance(outputs, torch.Tensor) else [x for each in outputs for x in flat(each)]


def run(model, inputs):
    return flat(model.layer(*inputs))


def assert_close(found, wanted, tolerance=1e-5):
    for one, two in zip(found, wanted, strict=True):
        assert one.shape == two.shape
        error = (one.detach().double() - two.detach().double()).abs().max() / two.detach().abs().max().double()
        assert error < tolerance, f"off by {error:.1e} of the largest value"


def assert_same_bits(found, wanted):
    assert all(same_bits(*pair) for pair in zip(found, wanted, strict=True))


@every_case
def test_every_matrix_is_adapted_by_its_name_in_torch(name):
    plain, model, _ = trained(name)
    pairs = model.layer.lora.default
    assert sorted(pairs) == sorted(matrices(plain))
    for key in pairs:
        out_features, in_features = plain.get_parameter(key).shape
        assert pairs[key].A.shape == (2, in_features)
        assert pairs[key].B.shape == (out_features, 2)
    own = [f"layer.lora.default.{key}.{matrix}" for key in pairs for matrix in "AB"]
    assert sorted(key for key in model.state_dict() if ".lora." in key) == sorted(own)
    assert sorted(lora_state_dict(model)) == sorted(own)


@every_case
def test_start_is_the_plain_layers_bit_for_bit(name):
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    adapt(model)
    for training in (True, False):
        assert_same_bits(run(model.train(training), inputs), run(plain.train(training), inputs))
        with torch.no_grad():
            assert_same_bits(run(model, inputs), run(plain, inputs))
        with torch.inference_mode():
            assert_close(run(model, inputs), run(plain, inputs), 1e-6)


@every_case
def test_output_is_that_of_the_weights_with_the_product_added(name):
    plain, model, inputs = trained(name)
    wanted = expected(plain, values_of(model), inputs)
    output = run(model, inputs)
    assert_close(output, wanted)
    assert_same_bits(run(model.eval(), inputs), output)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(run(model, inputs), wanted)
    with pytest.raises(AssertionError):  # the adapters matter
        assert_close(flat(plain(*inputs)), wanted, 1e-2)


@every_case
def test_gradients_are_those_through_the_weights_with_the_product_added(name):
    plain, model, inputs = trained(name)
    values = values_of(model)
    found, wanted = run(model, inputs), expected(plain, values, inputs)
    mixed = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) for y in found]
    sum((y * m).sum() for y, m in zip(found, mixed, strict=True)).backward()
    sum((y * m).sum() for y, m in zip(wanted, mixed, strict=True)).backward()
    for key, leaves in values.items():
        pair = model.layer.lora.default[key]
        assert_close([pair.A.grad, pair.B.grad], [leaf.grad for leaf in leaves], 2e-5)
        assert pair.A.grad.dtype == pair.B.grad.dtype == torch.float32
    frozen = [p for key, p in model.named_parameters() if ".lora." not in key]
    assert len(frozen) == len(list(plain.parameters()))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


@every_case
def test_merged_output_equals_the_unmerged_one_and_unmerge_gives_every_bit_back(name):
    plain, model, inputs = trained(name)
    values, output = oracles.snapshot(model), run(model, inputs)
    sums = {key: plain.get_parameter(key).double() + SCALE * B @ A for key, (A, B) in values_of(model).items()}
    for _ in range(2):
        merge_lora(model)
        assert type(model.layer) is type(plain)
        assert_close(run(model, inputs), output)
        for key, total in sums.items():
            assert_close([model.layer.get_parameter(key)], [total], 2e-7)
        unmerge_lora(model)
        oracles.assert_same_values(model, values)
        assert_same_bits(run(model, inputs), output)


@every_case
def test_parameters_are_the_same_objects_before_during_and_after(name):
    model, inputs = build(name)
    layer, keys, before = model.layer, list(model.state_dict()), dict(model.layer.named_parameters())
    facts = set(layer.__dict__)
    for leave in (merge_lora, remove_lora):
        train_by_hand(adapt(model))
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                model.layer(*inputs)
            assert all(layer._parameters[key] is before[key] for key in before)
            assert_flat_weights_are_parameters(layer, before)
        assert [key for key in model.state_dict() if ".lora." not in key] == keys
        leave(model)
        assert dict(layer.named_parameters()).keys() == before.keys()
        assert all(layer.get_parameter(key) is before[key] and before[key].requires_grad for key in before)
        assert_flat_weights_are_parameters(layer, before)
    assert list(model.state_dict()) == keys
    assert set(layer.__dict__) == facts


def assert_flat_weights_are_parameters(layer, parameters):
    names = getattr(layer, "_flat_weights_names", [])
    assert all(
        weight is parameters[key] for key, weight in zip(names, getattr(layer, "_flat_weights", []), strict=True)
    )


@pytest.mark.parametrize("name", LISTS)
def test_flat_weights_are_parameters_after_a_forward_that_fails(name):
    _, model, inputs = trained(name)
    before = {key: p for key, p in model.layer.named_parameters() if "lora." not in key}
    output = run(model, inputs)
    with pytest.raises((RuntimeError, ValueError)):
        model.layer(torch.randn(LENGTH, BATCH, WIDTH + 1))
    assert_flat_weights_are_parameters(model.layer, before)
    assert_same_bits(run(model, inputs), output)


@every_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_act_alike_and_stand_alone(name, copied):
    _, model, inputs = trained(name)
    values, output = oracles.snapshot(model), run(model, inputs)
    other = copied(model)
    assert type(other.layer) is type(model.layer)
    assert_same_bits(run(other, inputs), output)
    assert_flat_weights_are_parameters(other.layer, dict(other.layer.named_parameters()))
    run(other, inputs)[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    merge_lora(other)
    assert_close(run(other, inputs), output)
    oracles.assert_same_values(model, values)
    again = copied(other)
    unmerge_lora(again)
    oracles.assert_same_values(again, values)
    assert_same_bits(run(again, inputs), output)


@every_case
def test_disable_and_remove_give_the_plain_output_back(name):
    plain, model, inputs = trained(name)
    with disable_lora(model):
        assert_close(run(model, inputs), flat(plain(*inputs)), 1e-6)
    remove_lora(model)
    assert type(model.layer) is type(plain)
    assert_same_bits(run(model, inputs), flat(plain(*inputs)))


SOME = {
    "lstm-two-layers": (["layer.weight_hh_l0"], ["weight_hh_l0"]),
    "lstm-projection": (
        ["re:layer\\.weight_hr_.*"],
        ["weight_hr_l0", "weight_hr_l0_reverse", "weight_hr_l1", "weight_hr_l1_reverse"],
    ),
    "gru-two-layers": (
        ["weight_ih_l*"],
        ["weight_ih_l0", "weight_ih_l0_reverse", "weight_ih_l1", "weight_ih_l1_reverse"],
    ),
    "rnn-relu": (["weight_ih_l1", "layer.weight_hh_l0"], ["weight_ih_l1", "weight_hh_l0"]),
    "gru-cell": (["weight_ih"], ["weight_ih"]),
}


@pytest.mark.parametrize("name", SOME)
def test_some_of_the_matrices_can_be_adapted_and_only_they_are_merged(name):
    targets, keys = SOME[name]
    plain, model, inputs = trained(name, targets)
    assert sorted(model.layer.lora.default) == sorted(keys)
    output = run(model, inputs)
    assert_close(output, expected(plain, values_of(model), inputs))
    merge_lora(model)
    assert_close(run(model, inputs), output)
    changed = [key for key, p in model.layer.named_parameters() if not same_bits(p, plain.get_parameter(key))]
    assert sorted(changed) == sorted(keys)


@every_case
def test_dropout_of_the_adapter_is_refused_and_nothing_changes(name):
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"`layer` has code that reads its weight.* `dropout=0.1` cannot act: set dropout=0"
    ):
        adapt(model, dropout=0.1)
    assert type(model.layer) is type(plain.layer)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_bits(run(model, inputs), run(plain, inputs))


def test_dropout_of_the_layer_draws_as_in_the_plain_one():
    torch.manual_seed(0)
    plain, x = nn.LSTM(WIDTH, HIDDEN, num_layers=2, dropout=0.5), torch.randn(LENGTH, BATCH, WIDTH)
    model = nn.Sequential()
    model.add_module("layer", copy.deepcopy(plain))
    adapt(model)
    torch.manual_seed(7)
    found = run(model, (x,))
    torch.manual_seed(7)
    assert_same_bits(found, flat(plain(x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["lstm-two-layers", "lstm-projection", "gru", "rnn-relu", "lstm-cell", "gru-cell"])
def test_other_dtypes_give_the_sum_and_keep_adapters_in_fp32(name, dtype, tolerance):
    model, inputs = build(name, dtype)
    plain = copy.deepcopy(model.layer)
    adapt(model)
    assert_same_bits(run(model, inputs), flat(plain(*inputs)))
    train_by_hand(model)
    found = run(model, inputs)
    assert {y.dtype for y in found} == {dtype}
    assert_close(found, expected(plain, values_of(model), inputs), tolerance)
    sum(y.float().sum() for y in found).backward()
    assert {p.grad.dtype for _, p in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("name", ["lstm", "gru-two-layers", "rnn-cell"])
def test_a_state_dict_of_the_base_loads_into_the_adapted_layer(name):
    plain, model, inputs = trained(name)
    base = {f"layer.{key}": value * 2 for key, value in oracles.snapshot(plain).items()}
    model.load_state_dict(base)
    assert all(same_bits(model.state_dict()[key], value) for key, value in base.items())
    plain.load_state_dict({key.removeprefix("layer."): value for key, value in base.items()})
    assert_close(run(model, inputs), expected(plain, values_of(model), inputs))


def test_a_cell_without_a_state_starts_from_zeros():
    plain, model, (x, _) = trained("lstm-cell")
    assert_close(run(model, (x,)), expected(plain, values_of(model), (x,)))


def test_a_training_step_moves_adapters_alone():
    _, model, inputs = trained("lstm-two-layers")
    before = oracles.snapshot(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in lora_parameters(model)], lr=0.1)
    first = run(model, inputs)[0].square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = run(model, inputs)[0].square().mean()
        loss.backward()
        optimizer.step()
    assert loss < first
    assert {key for key, value in model.state_dict().items() if not same_bits(value, before[key])} == {
        key for key in before if ".lora." in key
    }
