"""Layers on the weight's side: never a stale sum, the gradients of the plain formula, and nothing kept in memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn

from lightning_lora import load_lora_state_dict, lora_parameters, lora_state_dict, remove_lora, use_adapters
from lightning_lora.layers.sums.group import SumGroup
from tests.helpers import oracles
from tests.helpers.oracles import same_bits
from tests.helpers.selection import slow_except
from tests.helpers.weight_side import (
    SIDES,
    WrittenOut,
    X,
    adapted,
    assert_close,
    assert_same_gradients,
    counted_sums,
    pair_of,
    tower,
)

MODES = {"train": nullcontext, "no-grad": torch.no_grad, "inference": torch.inference_mode}


def step(model, index):
    """A step of an optimizer that has the pair of one layer."""
    parameters = list(pair_of(model, index).parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()
    for parameter in parameters:
        parameter.grad = None


def load(model, index):
    model.load_state_dict({key: 1.25 * value for key, value in model.state_dict().items()})


def load_adapter_values(model, index):
    load_lora_state_dict(model, {key: 1.25 * value for key, value in lora_state_dict(model).items()})


def load_by_assignment(model, index):
    model.load_state_dict({key: 1.25 * value for key, value in model.state_dict().items()}, assign=True)


def write_in_place(model, index):
    with torch.no_grad():
        pair_of(model, index).B.mul_(3)


def give_data(model, index):
    pair_of(model, index).A.data = torch.full((2, 4), 0.25)


def change_scale(model, index):
    pair_of(model, index).scale *= 2


def write_base(model, index):
    with torch.no_grad():
        model.layers[index].weight.add_(0.25)


def replace_base(model, index):
    model.layers[index].weight = nn.Parameter(torch.eye(4), requires_grad=False)


def replace_a(model, index):
    pair_of(model, index).A = nn.Parameter(torch.ones(2, 4))


def replace_pair(model, index):
    pair = copy.deepcopy(pair_of(model, index))
    pair.B.data.mul_(3)
    model.layers[index].lora["default"] = pair


def write_data(model, index):
    for parameter in (*pair_of(model, index).parameters(), model.layers[index].weight):
        parameter.data.add_(0.25)


CHANGES = [
    *(
        step,
        load,
        load_adapter_values,
        load_by_assignment,
        write_in_place,
        give_data,
        change_scale,
        write_base,
        replace_base,
    ),
    *(replace_a, replace_pair),
]
# The layers that are called before the change of layer 1, and after it.
CALLS = {
    "all": ([0, 1, 2], [0, 1, 2]),
    "alone": ([0], [1]),
    "backwards": ([2, 1, 0], [1, 2, 0]),
    "left out": ([0, 2], [2, 1]),
    "again": ([1], [1]),
    "in the middle": ([0, 1], [2, 1]),
}


def changed_between(change, calls, mode):
    """The output after a change, the same written out, and the model."""
    model, (before, after) = tower(), CALLS[calls]
    with counted_sums() as sums:
        with MODES[mode]():
            model(X, before)
        change(model, 1)
        with MODES[mode]():
            present = model(X, after)
    assert sums
    expected = WrittenOut(model)
    return present, expected, expected(X, after)


@pytest.mark.parametrize(
    ("change", "calls", "mode"),
    slow_except(
        [*product(CHANGES, CALLS, ["train"]), *product(CHANGES, ["all"], MODES)], product(CHANGES, CALLS, MODES)
    ),
)
def test_a_change_is_seen_by_the_next_call(change, calls, mode):
    present, expected, output = changed_between(change, calls, mode)
    assert_close(present, output)
    if mode == "train":
        present.square().sum().backward()
        output.square().sum().backward()
        expected.assert_gradients()


# No version tells of a write through `.data`. It is seen where a layer is called again, which begins another forward,
# not by a layer that has not read its sum yet.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", [calls for calls in CALLS if calls not in ("alone", "left out", "in the middle")])
def test_a_write_through_data_is_seen_by_the_next_forward(calls, mode):
    present, _, output = changed_between(write_data, calls, mode)
    assert_close(present, output)


@pytest.mark.parametrize("change", [step, write_data, give_data, replace_base])
def test_a_change_is_seen_after_a_backward_pass(change):
    model = tower()
    model(X, [0, 2]).sum().backward()
    model.zero_grad()
    change(model, 1)
    expected = WrittenOut(model)
    present, output = model(X, [1]), expected(X, [1])
    assert_close(present, output)
    present.sum().backward()
    output.sum().backward()
    expected.assert_gradients()


def test_training_equals_the_activations_side():
    models = [tower(side) for side in SIDES]
    for model in models:
        optimizer = torch.optim.AdamW(pair_parameters(model), lr=0.05)
        for number in range(5):
            optimizer.zero_grad()
            model(X + number).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                model(X)
    present, expected = (model(X) for model in models)
    oracles.assert_close(present, expected, torch.float32)
    assert not torch.equal(expected, tower()(X))


# From the second step on the group knows its members.


def unfreeze_base(model, index):
    model.layers[index].weight.requires_grad_()


def freeze_a(model, index):
    pair_of(model, index).A.requires_grad_(False)


def disable(model, index):
    model.layers[index].lora.enabled = False
    pair_of(model, index).scale = 0.0  # what the written out formula has for it


def two_steps(model):
    for _ in range(2):
        model(X).square().sum().backward()
        model.zero_grad()


def test_the_members_of_a_group_are_looked_for_once(monkeypatch):
    model, looked_for, plain = tower(), [], SumGroup._selected
    monkeypatch.setattr(SumGroup, "_selected", lambda *arguments: looked_for.append(1) or plain(*arguments))
    two_steps(model)
    assert len(looked_for) == 1


def drop_a_rank(model, index):
    pair = pair_of(model, index)
    pair.A.data, pair.B.data = pair.A.data[:1], pair.B.data[:, :1]


def replace_by_a_part_of_the_same_memory(model, index):
    pair = pair_of(model, index)
    pair.A, pair.B = nn.Parameter(pair.A.data[:1]), nn.Parameter(pair.B.data[:, :1])


RANKS = [drop_a_rank, replace_by_a_part_of_the_same_memory]


@pytest.mark.parametrize("change", [*CHANGES, *RANKS, unfreeze_base, freeze_a, disable, write_data])
def test_what_changes_between_two_steps_is_seen(change):
    model = tower()
    two_steps(model)
    change(model, 1)
    for _ in range(2):
        model.zero_grad()
        expected = WrittenOut(model)
        present, output = model(X), expected(X)
        assert_close(present, output)
        present.square().sum().backward()
        output.square().sum().backward()
        if change is disable:
            expected.leaves["layers.1.lora.default.A"].grad = expected.leaves["layers.1.lora.default.B"].grad = None
        expected.assert_gradients()


def hook_pair(model, index):
    pair_of(model, index).register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("leave_side", [disable, unfreeze_base, hook_pair])
def test_a_write_through_data_is_seen_after_a_call_that_takes_the_other_side(leave_side):
    """The second call of layer 0 begins another forward pass, whether or not it reads a sum."""
    model = tower()
    model(X, [0])
    write_data(model, 1)
    leave_side(model, 0)
    assert_close(model(X, [0, 1]), WrittenOut(model)(X, [0, 1]))


def switch_off(model):
    pair_of(model, 0).scale = 0.0


def switch_all_off_and_one_on(model):
    for index in range(3):
        pair_of(model, index).scale = 0.0
    model(X)
    pair_of(model, 1).scale = 1.5


@pytest.mark.parametrize("change", [switch_off, switch_all_off_and_one_on])
def test_a_scale_of_zero_among_others(change):
    model = tower()
    change(model)
    expected = WrittenOut(model)
    for network in (model, expected):
        network(X).square().sum().backward()
    assert_close(model(X), expected(X))
    expected.assert_gradients()


@pytest.mark.parametrize("mode", MODES)
def test_a_write_through_data_after_sums_that_were_made_again_in_the_middle(mode):
    model = tower()
    with MODES[mode]():
        model(X)
        change_scale(model, 1)
        model(X)
        write_data(model, 0)
        assert_close(model(X), WrittenOut(model)(X))


@pytest.mark.parametrize("watch", ["pair", "A", "everything"])
def test_a_hook_that_comes_between_two_steps_is_called(watch):
    model, seen = tower(), []
    two_steps(model)
    pair = pair_of(model, 1)
    if watch == "pair":
        handle = pair.register_forward_hook(lambda *_: seen.append(1))
    elif watch == "A":
        handle = pair.A.register_hook(lambda gradient: seen.append(gradient))
    else:
        hook = lambda module, *_: seen.append(1) if module is pair else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(hook)
    expected = WrittenOut(model)
    model(X).square().sum().backward()
    expected(X).square().sum().backward()
    expected.assert_gradients()
    assert len(seen) == 1 and seen[0] is not None
    handle.remove()
    two_steps(model)
    assert len(seen) == 1


def pair_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_one_shape_are_summed_once_for_a_forward(mode):
    model = tower()
    with counted_sums() as sums, MODES[mode]():
        model(X)
        assert len(sums) == 1
        model(X)
        assert len(sums) <= 2


# Several passes through one sum, and several sums before one pass.


def both_losses(model, x):
    first, second = model(x, [0, 1]), model(x, [2, 1])
    return first.square().sum() + second.sum()


def two_forwards_one_backward(model, expected):
    both_losses(model, X).backward()
    both_losses(expected, X).backward()


def accumulated(model, expected):
    for network in (model, expected):
        for part in X.chunk(2):
            network(part).square().sum().backward()


def two_losses_of_one_forward(model, expected):
    for network in (model, expected):
        y = network(X)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()


def losses_of_separate_graphs(model, expected):
    for network in (model, expected):
        first, second = network(X, [0]).square().sum(), network(X, [1]).sum()
        first.backward()
        second.backward()


def one_layer_called_twice(model, expected):
    for network in (model, expected):
        network(X, [0, 1, 0, 0, 2, 1]).square().sum().backward()


def half_under_no_grad(model, expected):
    for network in (model, expected):
        with torch.no_grad():
            y = network(X, [0])
        network(y, [1, 2]).square().sum().backward()


def evaluated_before_backward(model, expected):
    for network in (model, expected):
        loss = network(X).square().sum()
        with torch.no_grad():
            network(X)
        loss.backward()


def one_side_detached(model, expected):
    for network in (model, expected):
        first, second = network(X), network(X + 1)
        (first - second.detach()).square().sum().backward()


def in_no_order(model, expected):
    for network in (model, expected):
        network(X, [2, 0, 1]).square().sum().backward()


def the_last_one_alone(model, expected):
    for network in (model, expected):
        network(X, [2]).square().sum().backward()


PASSES = [
    two_forwards_one_backward,
    accumulated,
    two_losses_of_one_forward,
    losses_of_separate_graphs,
    one_layer_called_twice,
    half_under_no_grad,
    evaluated_before_backward,
    one_side_detached,
    in_no_order,
    the_last_one_alone,
]


@pytest.mark.parametrize("passes", PASSES)
def test_gradients_are_those_of_the_formula(passes):
    model = tower()
    expected = WrittenOut(model)
    with counted_sums() as sums:
        passes(model, expected)
    assert sums
    expected.assert_gradients()
    other = tower("activations")
    passes(other, WrittenOut(other))
    assert_same_gradients(model, other)


@pytest.mark.parametrize("passes", [two_forwards_one_backward, two_losses_of_one_forward, losses_of_separate_graphs])
def test_gradients_of_pairs_with_scales_of_their_own(passes):
    model = tower(alpha_pattern={"layers.1": 5})
    expected = WrittenOut(model)
    passes(model, expected)
    expected.assert_gradients()


def test_a_second_derivative_by_matrices_of_another_scale():
    model = tower(alpha_pattern={"layers.1": 5})
    expected = WrittenOut(model)
    for network in (model, expected):
        output = network(X).square().sum()
        pair = pair_parameters(model)[2:4] if network is model else trained_leaves(expected)[2:4]
        slopes = torch.autograd.grad(output, pair, create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
    expected.assert_gradients()


def test_two_optimizers_in_turns_have_the_same_course():
    """A generator and a discriminator with layers of one shape, each trained while the other rests."""
    results = []
    for side in SIDES:
        model = tower(side, layers=4)
        halves = [[*model.layers[:2].parameters()], [*model.layers[2:].parameters()]]
        trained = [[p for p in half if p.requires_grad] for half in halves]
        optimizers = [torch.optim.Adam(half, lr=0.05) for half in trained]
        for number in range(3):
            for half, sign in ((1, 1), (0, -1)):
                for parameters, active in zip(trained, (half == 0, half == 1), strict=True):
                    for parameter in parameters:
                        parameter.requires_grad_(active)
                made = model(X + number, [0, 1])
                if half == 1:
                    made = made.detach()
                real = model(X - number, [2, 3]) if half == 1 else 0
                loss = sign * (model(made, [2, 3]) - real).square().sum()
                optimizers[half].zero_grad()
                loss.backward()
                optimizers[half].step()
        results.append(model(X))
    assert_close(*results)
    assert not torch.equal(results[0], tower(layers=4)(X))


def test_layers_that_were_not_called_do_not_move():
    model = tower()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(pair_parameters(model), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(X, [0, 2]).square().sum().backward()
        assert all(parameter.grad is None for parameter in pair_of(model, 1).parameters())
        optimizer.step()
    after = model.state_dict()
    moved = {name.split(".")[1] for name in after if not same_bits(after[name], before[name])}
    assert moved == {"0", "2"}


def test_the_gradient_of_one_a_alone():
    model = tower()
    expected = WrittenOut(model)
    leaf = expected.leaves["layers.1.lora.default.A"]
    (present,) = torch.autograd.grad(model(X).square().sum(), [pair_of(model, 1).A])
    assert_close(present, torch.autograd.grad(expected(X).square().sum(), [leaf])[0])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(model(X, [0]).sum(), [pair_of(model, 1).A])


def test_batched_gradients():
    model = tower()
    expected = WrittenOut(model)
    leaf, y = expected.leaves["layers.0.lora.default.B"], expected(X).sum(0)
    present = torch.autograd.grad(model(X).sum(0), [pair_of(model, 0).B], torch.eye(4), is_grads_batched=True)[0]
    rows = [torch.autograd.grad(y[index], [leaf], retain_graph=True)[0] for index in range(4)]
    assert_close(present, torch.stack(rows))


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2]], ids=["all", "some"])
def test_a_gradient_penalty(order):
    model = tower()
    expected = WrittenOut(model)
    for network, x in ((model, X.clone()), (expected, X.double())):
        x.requires_grad_()
        y = network(x, order).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        (y + slope.square().sum()).backward()
    expected.assert_gradients()


def test_a_second_derivative_by_a_and_b():
    model = tower()
    expected = WrittenOut(model)
    for network, parameters in ((model, pair_parameters(model)), (expected, trained_leaves(expected))):
        slopes = torch.autograd.grad(network(X).square().sum(), parameters, create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
    expected.assert_gradients()


def trained_leaves(expected):
    return [leaf for leaf in expected.leaves.values() if leaf.requires_grad]


def test_a_second_derivative_after_a_step_is_refused():
    model = tower()
    (slope,) = torch.autograd.grad(model(X).square().sum(), [pair_of(model, 0).A], create_graph=True)
    y = model(X).square().sum()
    step(model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, [pair_of(model, 0).A], create_graph=True)
    assert slope.requires_grad


def test_a_second_derivative_after_a_step_of_layers_that_were_not_called():
    model = tower(layers=4)
    expected = WrittenOut(model)
    loss = model(X, [0, 1]).square().sum()
    step(model, 3)
    for network, output in ((model, loss), (expected, expected(X, [0, 1]).square().sum())):
        pair = pair_parameters(model)[:2] if network is model else trained_leaves(expected)[:2]
        slopes = torch.autograd.grad(output, pair, create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
    expected.assert_gradients()


# What trains, and who looks on.


@pytest.mark.parametrize("when", ["before", "in between"])
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_a_matrix_that_is_frozen_and_unfrozen(matrix, when):
    model = tower()
    if when == "in between":
        model(X, [0])
    getattr(pair_of(model, 1), matrix).requires_grad_(False)
    expected = WrittenOut(model)
    model(X, [1, 2]).sum().backward()
    expected(X, [1, 2]).sum().backward()
    expected.assert_gradients()
    model.zero_grad()
    if when == "in between":
        model(X, [0])
    getattr(pair_of(model, 1), matrix).requires_grad_(True)
    expected = WrittenOut(model)
    model(X, [1, 2]).sum().backward()
    expected(X, [1, 2]).sum().backward()
    expected.assert_gradients()


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_a_base_that_trains_gets_its_gradient(key):
    model = tower()
    model(X, [0])
    getattr(model.layers[1], key).requires_grad_(True)
    expected = WrittenOut(model)
    model(X, [1, 2]).square().sum().backward()
    expected(X, [1, 2]).square().sum().backward()
    assert getattr(model.layers[1], key).grad is not None
    expected.assert_gradients()


def test_no_gradients_where_nothing_trains():
    model = tower().requires_grad_(False)
    assert not model(X).requires_grad
    assert_close(model(X), WrittenOut(model)(X))


def watched(model, register):
    """What the hooks of every A and B see of a pass that leaves the last layer out."""
    seen = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            register(parameter, lambda value, name=name: seen.setdefault(name, []).append(value.detach().clone()))
    model(X, [0, 1, 0]).square().sum().backward()
    return seen


@pytest.mark.parametrize("register", [torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook])
def test_hooks_of_a_and_b_see_what_they_see_on_the_other_side(register):
    model = tower()
    present, expected = watched(model, register), watched(tower("activations"), register)
    assert present.keys() == expected.keys() and len(present) == 4
    for name, values in present.items():
        assert len(values) == 1
        assert_close(sum(values), sum(expected[name]))


@pytest.mark.parametrize("side", SIDES)
def test_a_hook_changes_the_gradient(side):
    model = tower(side)
    pair_of(model, 0).A.register_hook(lambda gradient: 2 * gradient)
    pair_of(model, 2).A.register_hook(lambda gradient: 2 * gradient)
    expected = WrittenOut(model)
    model(X, [0, 1]).square().sum().backward()
    expected(X, [0, 1]).square().sum().backward()
    expected.leaves["layers.0.lora.default.A"].grad *= 2
    expected.assert_gradients()


def test_a_forward_hook_on_an_adapter_is_called():
    model = tower()
    expected = WrittenOut(model)(X)
    model(X)
    calls = []
    handle = pair_of(model, 1).register_forward_hook(lambda *arguments: calls.append(1))
    with counted_sums() as sums:
        assert_close(model(X), expected)
    assert calls and sums  # the other layers are summed without it
    handle.remove()
    assert_close(model(X), expected)
    assert len(calls) == 1


def test_an_optimizer_in_the_hooks_of_backward():
    results = []
    for side in SIDES:
        model = tower(side)
        optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in pair_parameters(model)}

        def update(parameter, optimizers=optimizers):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(update)
        for order in ([0, 1, 2], [2, 0], [1, 2]):
            model(X, order).square().sum().backward()
        results.append(model(X))
    assert_close(*results)


# Several adapters.


def several_adapters(strengths=None):
    """A tower on the weight's side with two adapters, as after some training."""
    model = tower()
    adapted(model, name="de")
    set_strengths(model, strengths or {})
    return model


def set_strengths(model, strengths):
    for layer in model.layers:
        layer.lora.strengths = strengths
        layer.lora.prepare_choices()


def by_hand(model, weights):
    """The output with ``W0 + c * scale * B @ A``, and whatever gradients go through it."""
    x = X.double()
    for layer in model.layers:
        total = layer.weight.detach().double()
        for name, c in weights.items():
            pair = layer.lora[name]
            total = total + c * pair.scale * pair.B.double() @ pair.A.double()
        x = torch.tanh(torch.nn.functional.linear(x, total, layer.bias.detach().double()))
    return x


def assert_acts(model, weights, sums):
    """That the adapters act with these ``weights``, forward and backward, with that many sums of the group."""
    with counted_sums() as counted:
        y = model(X)
    assert len(counted) == sums
    expected = by_hand(model, weights)
    assert_close(y, expected)
    if not weights:
        assert not y.requires_grad
        return
    parameters = dict(lora_parameters(model))
    found = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), list(parameters.values()), allow_unused=True)
    for name, gradient, other in zip(parameters, found, wanted, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert_close(gradient, other)


@pytest.mark.parametrize("strengths", [{"default": 0.0}, {"de": 0.0}, {}])
def test_an_adapter_that_rests_leaves_the_others_on_the_weights_side(strengths):
    model = several_adapters(strengths)
    assert_acts(model, {name: 1.0 for name in ("default", "de") if name not in strengths}, sums=1)


def test_sums_are_made_anew_when_the_strengths_change():
    model = several_adapters({"de": 0.0})
    for strengths, weights, sums in (
        ({"de": 0.0}, {"default": 1.0}, 1),
        ({"default": 0.0}, {"de": 1.0}, 1),
        ({}, {"default": 1.0, "de": 1.0}, 1),
        ({"de": 0.5}, {"default": 1.0, "de": 0.5}, 0),
        ({"de": 0.0, "default": 0.0}, {}, 0),
        ({"default": 0.0}, {"de": 1.0}, 1),
    ):
        set_strengths(model, strengths)
        for _ in range(2):
            assert_acts(model, weights, sums)


def test_strengths_that_are_written_in_place_are_seen():
    strengths = {"de": 0.0}
    model = several_adapters(strengths)
    assert_acts(model, {"default": 1.0}, sums=1)
    strengths.update({"de": 1.0, "default": 0.0})
    for layer in model.layers:
        layer.lora.prepare_choices()
    assert_acts(model, {"de": 1.0}, sums=1)


BOTH = {"default": 1.0, "de": 1.0}
CHOICES = [("de", {"de": 1.0}, 1), (BOTH, BOTH, 1), (None, {}, 0), ({"default": 0.5}, {"default": 0.5}, 0)]


@pytest.mark.parametrize(("choice", "weights", "sums"), CHOICES)
def test_a_choice_for_the_whole_batch_leaves_the_sums_of_what_acts_without_one(choice, weights, sums):
    model = several_adapters({"de": 0.0})
    for _ in range(2):
        assert_acts(model, {"default": 1.0}, sums=1)
        with use_adapters(model, choice):
            assert_acts(model, weights, sums)
            write_in_place(model, 1)
            assert_acts(model, weights, sums)
        assert_acts(model, {"default": 1.0}, sums=1)
        with use_adapters(model.layers[1], choice):
            x = torch.tanh(model.layers[0](X))
            y = torch.tanh(model.layers[1](x))
        plain = oracle_of_layer(model.layers[1], x, weights)
        assert_close(y, torch.tanh(plain))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", ["all", "left out", "in the middle"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_inside_of_a_choice(change, calls, mode):
    model, (before, after) = several_adapters(), CALLS[calls]
    with use_adapters(model, "default"):
        with MODES[mode]():
            model(X, before)
        change(model, 1)
        with counted_sums() as sums, MODES[mode]():
            present = model(X, after)
    assert sums
    expected = WrittenOut(model)
    output = expected(X, after)
    assert_close(present, output)
    if mode == "train":
        present.square().sum().backward()
        output.square().sum().backward()
        pairs = [expected.model.layers[index].lora["default"] for index in set(after)]
        assert all(parameter.grad is not None for pair in pairs for parameter in pair.parameters())
        assert all(p.grad is None for layer in model.layers for p in layer.lora["de"].parameters())
        expected.assert_gradients()


def test_adapters_that_change_names_inside_of_their_layers():
    """The same modules in the same order under other names."""
    model = several_adapters()
    for weights in ({"default": 1.0}, {"default": 1.0}):
        with use_adapters(model, "default"):
            assert_acts(model, weights, sums=1)
        for layer in model.layers:
            adapters = layer.lora
            adapters._modules.update(dict(zip(adapters._modules, reversed(adapters._modules.values()), strict=True)))


def oracle_of_layer(layer, x, weights):
    delta = sum(c * layer.lora[name].scale * layer.lora[name].B @ layer.lora[name].A for name, c in weights.items())
    return torch.nn.functional.linear(x, layer.weight + delta, layer.bias)


def test_dropout_of_a_resting_adapter_is_no_reason_for_the_other_side():
    model = several_adapters()
    for layer in model.layers:
        layer.lora["de"].dropout = 0.5
    with counted_sums() as sums:
        model(X)
    assert not sums
    set_strengths(model, {"de": 0.0})
    assert_acts(model, {"default": 1.0}, sums=1)


def test_one_adapter_goes_while_the_others_are_summed():
    model = several_adapters()
    assert_acts(model, {"default": 1.0, "de": 1.0}, sums=1)
    remove_lora(model, name="default")
    assert_acts(model, {"de": 1.0}, sums=1)
