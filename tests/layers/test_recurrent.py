"""LSTM, GRU, RNN and their cells: W + scale * B A in each weight matrix, by torch's own names for them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.helpers import oracles
from tests.helpers.layer_cases import cast, tensors
from tests.helpers.layer_cases.recurrent import BATCH, CASES, HIDDEN, LENGTH, WIDTH, call
from tests.helpers.oracles import SCALE, same_bits
from tests.helpers.selection import slow_except
from tests.helpers.weight_side import counted_sums

every_case = pytest.mark.parametrize("name", slow_except(["lstm-projection", "gru-packed", "lstm-cell"], CASES))
LISTS = [name for name in CASES if "cell" not in name]


def build(name, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer.to(dtype))
    return model, cast(inputs, dtype)


def adapt(model, targets=("layer",), compute="auto", **arguments):
    apply_lora(model, LoRAConfig(r=2, alpha=2 * SCALE, targets=targets, **arguments), compute=compute)
    return model


def train_by_hand(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(name, targets=("layer",), dtype=torch.float32, compute="auto"):
    model, inputs = build(name, dtype)
    plain = copy.deepcopy(model.layer)
    return plain, train_by_hand(adapt(model, targets, compute)), inputs


def values_of(model):
    """A and B of each matrix as leaves of their own, in fp64."""
    pairs = model.layer.lora.default
    return {key: [m.detach().double().requires_grad_() for m in (pairs[key].A, pairs[key].B)] for key in pairs}


def expected(plain, values, inputs):
    """What the plain layer gives in fp64 with the product added to its weights."""
    plain = copy.deepcopy(plain).double()
    sums = {key: plain.get_parameter(key).detach() + SCALE * B @ A for key, (A, B) in values.items()}
    return tensors(call(plain, sums, cast(inputs), {}))


def run(model, inputs):
    return tensors(model.layer(*inputs))


def assert_same_bits(found, wanted):
    assert all(same_bits(*pair) for pair in zip(found, wanted, strict=True))


def assert_close(found, wanted, tolerance=1e-5):
    for one, two in zip(found, wanted, strict=True):
        assert one.shape == two.shape
        error = (one.detach().double() - two.detach().double()).abs().max() / two.detach().abs().max().double()
        assert error < tolerance, f"off by {error:.1e} of the largest value"


def assert_flat_weights_are_parameters(layer, parameters):
    names = getattr(layer, "_flat_weights_names", [])
    assert all(
        weight is parameters[key] for key, weight in zip(names, getattr(layer, "_flat_weights", []), strict=True)
    )


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("leave", [merge_lora, remove_lora])
def test_flat_weights_are_parameters_before_during_and_after(name, leave):
    _, model, inputs = trained(name)
    layer, before = model.layer, {key: p for key, p in model.layer.named_parameters() if "lora." not in key}
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            layer(*inputs)
        assert_flat_weights_are_parameters(layer, before)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert_flat_weights_are_parameters(other.layer, dict(other.layer.named_parameters()))
    leave(model)
    assert_flat_weights_are_parameters(layer, before)
    if leave is merge_lora:
        unmerge_lora(model)
    assert_flat_weights_are_parameters(layer, before)


@pytest.mark.parametrize("name", LISTS)
def test_flat_weights_are_parameters_after_a_forward_that_fails(name):
    _, model, inputs = trained(name)
    before = {key: p for key, p in model.layer.named_parameters() if "lora." not in key}
    output = run(model, inputs)
    with pytest.raises((RuntimeError, ValueError)):
        model.layer(torch.randn(LENGTH, BATCH, WIDTH + 1))
    assert_flat_weights_are_parameters(model.layer, before)
    assert_same_bits(run(model, inputs), output)


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
    assert_same_bits(found, tensors(plain(x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["lstm-two-layers", "lstm-projection", "gru", "rnn-relu", "lstm-cell", "gru-cell"])
def test_other_dtypes_give_the_sum_and_keep_adapters_in_fp32(name, dtype, tolerance):
    model, inputs = build(name, dtype)
    plain = copy.deepcopy(model.layer)
    adapt(model)
    assert_same_bits(run(model, inputs), tensors(plain(*inputs)))
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


@pytest.mark.slow
def test_a_cell_compiles_as_a_whole():
    _, model, inputs = trained("lstm-cell")
    torch._dynamo.reset()
    compiled = torch.compile(model.layer, backend="aot_eager", fullgraph=True)
    assert_close(tensors(compiled(*inputs)), run(model, inputs))


# Summed together, as on a GPU.


def assert_same_as_the_formula(model, present, values, wanted):
    assert_close(present, wanted)
    for outputs in (present, wanted):
        sum(y.square().sum() for y in outputs).backward()
    for key, factors in values.items():
        pair = model.layer.lora.default[key]
        for gradient, exact in zip((pair.A.grad, pair.B.grad), factors, strict=True):
            oracles.assert_close(gradient, exact.grad, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_one_sum_for_all_weights_against_fp64(name):
    plain, model, inputs = trained(name, compute="weights")
    before = {key: p for key, p in model.layer.named_parameters() if "lora." not in key}
    values = values_of(model)
    with counted_sums() as sums:
        present = run(model, inputs)
    assert len(sums) == 1
    assert_same_as_the_formula(model, present, values, expected(plain, values, inputs))
    assert all(model.layer.get_parameter(key) is parameter for key, parameter in before.items())
    if name in LISTS:
        assert_flat_weights_are_parameters(model.layer, before)


@pytest.mark.parametrize("name", SOME)
def test_one_sum_for_some_of_the_weights(name):
    targets, _ = SOME[name]
    plain, model, inputs = trained(name, targets, compute="weights")
    values = values_of(model)
    assert_same_as_the_formula(model, run(model, inputs), values, expected(plain, values, inputs))


def test_a_layer_that_is_called_for_each_position_in_turn():
    plain, model, (x, _) = trained("lstm-two-layers", compute="weights")
    values, twin = values_of(model), copy.deepcopy(plain)
    outputs, state = [], None
    for position in x:
        output, state = model.layer(position.unsqueeze(0), state)
        outputs.append(output)
    assert_same_as_the_formula(model, [torch.cat(outputs)], values, expected(twin, values, (x,))[:1])


def test_a_step_between_two_calls_is_seen():
    plain, model, inputs = trained("gru", compute="weights")
    for _ in range(3):
        values = values_of(model)
        model.zero_grad()
        assert_same_as_the_formula(model, run(model, inputs), values, expected(plain, values, inputs))
        with torch.no_grad():
            for _, parameter in lora_parameters(model):
                parameter.sub_(parameter.grad, alpha=0.01)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sums_under_activation_checkpointing(use_reentrant):
    plain, model, (x, *_) = trained("rnn-relu", compute="weights")
    values, x = values_of(model), x.requires_grad_()
    present = tensors(checkpoint(model.layer, x, use_reentrant=use_reentrant))
    assert_same_as_the_formula(model, present, values, expected(plain, values, (x.detach(),)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_write_through_data_before_a_checkpointed_pass(use_reentrant):
    """The first pass of a reentrant checkpoint has merged weights: its recomputation must not read older sums."""
    plain, model, (x, *_) = trained("rnn-relu", compute="weights")
    run(model, (x,))
    for _, parameter in lora_parameters(model):
        parameter.data.mul_(2)
    values, x = values_of(model), x.requires_grad_()
    present = tensors(checkpoint(model.layer, x, use_reentrant=use_reentrant))
    assert_same_as_the_formula(model, present, values, expected(plain, values, (x.detach(),)))


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm-cell"])
def test_under_autocast_all_parameters_have_the_dtype_of_the_base(name, monkeypatch):
    _, model, inputs = trained(name, compute="weights")
    used, plain = [], type(model.layer).lora_set_parameter
    monkeypatch.setattr(
        type(model.layer),
        "lora_set_parameter",
        lambda layer, key, value: used.append(value.dtype) or plain(layer, key, value),
    )
    with torch.autocast("cpu", torch.bfloat16):
        run(model, inputs)
    assert set(used) == {torch.float32}


def test_a_summed_forward_that_fails_leaves_the_parameters():
    plain, model, inputs = trained("gru-two-layers", compute="weights")
    before = {key: p for key, p in model.layer.named_parameters() if "lora." not in key}
    with pytest.raises((RuntimeError, ValueError)):
        model.layer(torch.randn(LENGTH, BATCH, WIDTH + 1))
    assert_flat_weights_are_parameters(model.layer, before)
    assert_close(run(model, inputs), expected(plain, values_of(model), inputs))
