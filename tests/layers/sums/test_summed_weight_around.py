"""Around layers on the weight's side: checkpointing, copies, interrupts, casts, compilers, transforms, the verbs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from lightning_lora import disable_lora, merge_lora, remove_lora, unmerge_lora, use_adapters
from lightning_lora.layers.sums import group
from lightning_lora.layers.sums.group import place_now
from lightning_lora.layers.sums.reading import summed_weight
from tests.helpers import oracles
from tests.helpers.interrupts import interrupt, lines_in
from tests.helpers.models import FusedBlocks, Tower
from tests.helpers.oracles import same_bits, saved_and_loaded
from tests.helpers.weight_side import (
    BOTH_WAYS,
    SIDES,
    WrittenOut,
    X,
    adapted,
    assert_close,
    assert_same_gradients,
    counted_sums,
    gradients,
    pair_of,
    tower,
)


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def starting():
    """An input for a checkpoint with reentry, which needs one with a gradient."""
    return X.clone().requires_grad_()


# Activation checkpointing.


@BOTH_WAYS
def test_one_sum_for_a_checkpointed_forward_and_backward(use_reentrant):
    model = tower(layers=4)
    expected = WrittenOut(model)
    with counted_sums() as sums:
        model(starting(), use_reentrant=use_reentrant).square().sum().backward()
    assert len(sums) == 1
    expected(X).square().sum().backward()
    expected.assert_gradients()


def other_step(model):
    """A step of another optimizer, of layers that are summed with those of the checkpoint."""
    for parameter in pair_of(model, 3).parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(pair_of(model, 3).parameters(), lr=0.5)
    optimizer.step()
    optimizer.zero_grad()


def train_other(model):
    """A whole step of another optimizer."""
    model(X, [3]).square().sum().backward()
    torch.optim.SGD(pair_of(model, 3).parameters(), lr=0.5).step()
    pair_of(model, 3).zero_grad()


def evaluate(model):
    with torch.no_grad():
        model(X)


def infer(model):
    with torch.inference_mode():
        model(X)


def evaluate_in_bf16(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(X)


BETWEEN = [other_step, train_other, evaluate, infer, evaluate_in_bf16]


@BOTH_WAYS
@pytest.mark.parametrize("between", BETWEEN)
def test_what_happens_between_a_checkpoint_and_its_backward_pass(between, use_reentrant):
    model = tower(layers=4)
    expected = WrittenOut(model)
    loss = model(starting(), [0, 1, 2], use_reentrant=use_reentrant).square().sum()
    between(model)
    loss.backward()
    expected(X, [0, 1, 2]).square().sum().backward()
    expected.assert_gradients()


def test_a_step_of_another_optimizer_needs_no_other_sum():
    for use_reentrant in (True, False):
        model = tower(layers=4)
        with counted_sums() as sums:
            loss = model(starting(), [0, 1, 2], use_reentrant=use_reentrant).square().sum()
            other_step(model)
            loss.backward()
        assert len(sums) == 1


@BOTH_WAYS
def test_several_checkpointed_forwards_and_losses(use_reentrant):
    models = [tower(side) for side in SIDES]
    for model in models:
        first = model(starting(), use_reentrant=use_reentrant)
        second = model(starting() + 1, [1, 0], use_reentrant=use_reentrant)
        if not use_reentrant:  # with reentry a graph has one backward pass
            first.sum().backward(retain_graph=True)
        (first.square().sum() + second.sum()).backward()
        model(starting(), [2, 1], use_reentrant=use_reentrant).sum().backward()
    assert_same_gradients(*models)


@BOTH_WAYS
def test_some_layers_are_checkpointed(use_reentrant):
    models = [tower(side, layers=4) for side in SIDES]
    for model in models:
        x = starting()
        for index in range(4):
            x = model(x, [index], use_reentrant=use_reentrant if index % 2 else None)
        x.square().sum().backward()
    assert_same_gradients(*models)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # those of the inner one, at first
@BOTH_WAYS
def test_a_checkpoint_in_a_checkpoint(use_reentrant):
    models = [tower(side) for side in SIDES]
    for model in models:
        checkpoint(
            lambda x, model=model: model(x, use_reentrant=use_reentrant), starting(), use_reentrant=use_reentrant
        ).square().sum().backward()
    assert_same_gradients(*models)


@BOTH_WAYS
def test_checkpoints_whose_saved_tensors_are_offloaded(use_reentrant):
    models = [tower(side) for side in SIDES]
    for model in models:
        with torch.autograd.graph.save_on_cpu():
            model(starting(), use_reentrant=use_reentrant).square().sum().backward()
    assert_same_gradients(*models)


@BOTH_WAYS
def test_a_base_that_trains_under_a_checkpoint_gets_its_gradient(use_reentrant):
    model = tower()
    model.layers[1].weight.requires_grad_(True)
    expected = WrittenOut(model)
    model(starting(), use_reentrant=use_reentrant).square().sum().backward()
    expected(X).square().sum().backward()
    assert model.layers[1].weight.grad is not None
    expected.assert_gradients()


@BOTH_WAYS
def test_a_layer_whose_adapter_acts_again_under_a_checkpoint(use_reentrant):
    model = tower()
    model(X)
    model.layers[1].lora.enabled = False
    for _ in range(2):  # in the second pass the layer is not summed
        model(X)
    model.layers[1].lora.enabled = True
    expected = WrittenOut(model)
    model(starting(), use_reentrant=use_reentrant).square().sum().backward()
    expected(X).square().sum().backward()
    expected.assert_gradients()


@BOTH_WAYS
def test_hooks_of_checkpointed_layers_that_were_not_called(use_reentrant):
    model = tower()
    seen = []
    for index in (0, 2):
        pair_of(model, index).A.register_hook(lambda gradient: seen.append(gradient.shape))
    model(starting(), [0, 1], use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 1


@BOTH_WAYS
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_fused_projections_are_checkpointed(targets, use_reentrant):
    """The first layer that is called sums for all: its block saves no more tensors than its recomputation."""
    models = []
    for side in SIDES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FusedBlocks()
        models.append(adapted(model.double(), side, targets=targets, alpha_pattern={"blocks.1.*": 7.0}))
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        models[-1](x, use_reentrant=use_reentrant).square().sum().backward()
    assert_same_gradients(*models)


# Memory.


def sums_of(model):
    """Weak references to what the layers read in a forward pass."""
    read = []
    plain = F.linear

    def linear(x, weight, bias=None):
        read.append(weakref.ref(weight))
        return plain(x, weight, bias)

    return read, linear


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_nothing_of_a_weights_size_is_kept_after_a_backward_pass(use_reentrant, monkeypatch):
    model = tower()
    read, linear = sums_of(model)
    monkeypatch.setattr(F, "linear", linear)
    model(starting(), use_reentrant=use_reentrant).sum().backward()
    assert len(read) == 3 * (1 if use_reentrant is None else 2)
    assert [reference() for reference in read] == [None] * len(read)


# Which layers of a group are summed: those that read their sums.


class TwoSizes(nn.Module):
    """A small and a large linear layer, called on one input in an order that the call gives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(4, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x, order=("small", "large")):
        return torch.cat([getattr(self, name)(x).flatten() for name in order])


def two_sizes(monkeypatch):
    """The model with adapters, whose large layer takes the weight's side for up to 4 rows and the small one always."""
    monkeypatch.setattr("lightning_lora.layers.sums.sizes.MAX_WORK", 4 * 64 * 4)
    monkeypatch.setattr("lightning_lora.ops.dispatch.DEVICES", ("cpu",))
    return adapted(TwoSizes(), compute="auto")


def both_written_out(model, x, order=("small", "large")):
    layers = [(getattr(model, name), getattr(model, name).lora["default"]) for name in order]
    return torch.cat([(x @ (layer.weight + pair.scale * pair.B @ pair.A).t()).flatten() for layer, pair in layers])


def summed_now(model):
    return [name for name in ("small", "large") if getattr(model, name).lora.sums["weight"].value is not None]


def test_a_layer_that_takes_the_other_side_is_not_summed(monkeypatch):
    """Whether it did so in the last forward pass decides, and before the first one the size of the input."""
    model = two_sizes(monkeypatch)
    for rows, summed in [(8, 1), (8, 1), (2, 2), (8, 2), (8, 1), (8, 1)]:
        y = model(torch.randn(rows, 4))
        assert summed_now(model) == ["small", "large"][:summed]
        y.sum().backward()


@torch.no_grad()
def test_a_prompt_and_single_tokens(monkeypatch):
    """After the first token both layers are summed together, once for each token."""
    model = two_sizes(monkeypatch)
    model(torch.randn(8, 4))
    assert summed_now(model) == ["small"]
    model(torch.randn(1, 4))
    with counted_sums() as sums:
        for _ in range(3):
            x = torch.randn(1, 4)
            torch.testing.assert_close(model(x), both_written_out(model, x))
    assert summed_now(model) == ["small", "large"] and len(sums) == 3


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small"), ("large",)])
def test_inputs_that_grow_and_shrink_give_the_gradients_of_the_formula(order, monkeypatch):
    model = two_sizes(monkeypatch)
    for rows in (2, 8, 8, 2, 2, 8, 1):
        x = torch.randn(rows, 4)
        pairs = [parameter for parameter in model.parameters() if parameter.requires_grad]
        y, expected = model(x, order), both_written_out(model, x, order)
        torch.testing.assert_close(y, expected)
        present = torch.autograd.grad(y.square().sum(), pairs, allow_unused=True)
        by_hand = torch.autograd.grad(expected.square().sum(), pairs, allow_unused=True)
        for gradient, wanted in zip(present, by_hand, strict=True):
            assert (gradient is None) == (wanted is None)
            if gradient is not None:
                assert_close(gradient, wanted)


def test_a_layer_that_is_called_twice_is_summed_if_one_call_reads_it(monkeypatch):
    model, x = two_sizes(monkeypatch), torch.randn(8, 4)
    for _ in range(2):
        with counted_sums() as sums:
            model.large(x[:2])
            model.large(x)
    assert len(sums) == 1


def test_a_write_through_data_is_seen_after_a_longer_input(monkeypatch):
    """The second call of the large layer begins another forward pass, though it takes the activations' side."""
    model, x = two_sizes(monkeypatch), torch.randn(8, 4)
    model(x[:2], ["large"])
    model.small.lora["default"].A.data.add_(0.25)
    torch.testing.assert_close(model(x, ["large", "small"]), both_written_out(model, x, ["large", "small"]))


@pytest.fixture
def without_collector():
    """No automatic garbage collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["fresh", "after a forward", "after no grad", "after a backward"])
def test_a_model_is_freed_without_the_garbage_collector(state, without_collector):
    model = tower()
    STATES[state](model)
    gc.collect()  # what `apply_lora` leaves
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.slow
def test_a_layer_that_leaves_the_model_is_freed(without_collector):
    model = tower()
    model(X).sum().backward()
    gc.collect()
    reference = weakref.ref(model.layers[2].weight)
    model.layers = model.layers[:2]
    assert reference() is None
    assert_close(model(X), WrittenOut(model)(X))


def collect_and_place(weight):
    gc.collect()
    return place_now(weight)


def test_a_layer_that_the_collector_frees_while_its_group_is_summed(monkeypatch):
    model = tower()
    model(X)
    layer, reference = model.layers[2], weakref.ref(model.layers[2].weight)
    layer.__dict__["holder"] = [layer]  # only the garbage collector frees it
    model.layers = model.layers[:2]
    del layer
    monkeypatch.setattr(group, "place_now", collect_and_place)
    expected = WrittenOut(model)
    for network in (model, expected):
        network(X).square().sum().backward()
    expected.assert_gradients()
    model(X)
    gc.collect()
    assert reference() is None


# Copies.

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "saved": saved_and_loaded,
}
STATES = {
    "fresh": lambda model: None,
    "after a forward": lambda model: model(X),
    "after no grad": evaluate,
    "after a backward": lambda model: model(X).sum().backward(),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("state", STATES)
def test_a_copy_is_independent_and_gives_the_same_bits(state, copied):
    model = tower()
    STATES[state](model)
    model.zero_grad()
    twin = COPIES[copied](model)
    with counted_sums() as sums:
        assert same_bits(twin(X), model(X))
    assert len(sums) == 2
    twin(X).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = model(X)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert same_bits(model(X), before)
    assert_close(twin(X), WrittenOut(twin)(X))
    del model
    assert_close(twin(X), WrittenOut(twin)(X))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_one_layer_brings_no_other_along(copied):
    models = [tower(side, layers=6) for side in SIDES]
    for model in models:
        model(X)
    sizes = [len(pickle.dumps(model.layers[1])) for model in models]
    assert sizes[0] < sizes[1] + 1000
    layer = models[0].layers[1]
    twin = COPIES[copied](layer)
    with counted_sums() as sums:
        assert same_bits(twin(X), layer(X))
    assert sums
    twin(X).sum().backward()
    assert layer.lora["default"].A.grad is None and twin.lora["default"].A.grad is not None


def test_adapters_that_are_copied_into_another_layer():
    model = tower()
    model(X)
    model.layers[1].lora = copy.deepcopy(model.layers[0].lora)
    assert_close(model(X), WrittenOut(model)(X))


def test_a_shallow_copy_computes_with_its_own_weight():
    layer = tower().layers[0]
    layer(X)
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(2 * layer.weight.detach(), requires_grad=False)}
    pair = layer.lora["default"]
    expected = F.linear(X.double(), 2 * layer.weight.double() + 1.5 * pair.B.double() @ pair.A.double(), None)
    assert_close(twin(X), expected + layer.bias)


# Interrupts.


def one_step(model):
    model(starting(), [0, 1]).square().sum().backward()


def checkpointed_step(model):
    model(starting(), [0, 1], use_reentrant=True).square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("call", [one_step, checkpointed_step, evaluate])
def test_an_interrupt_leaves_nothing_wrong(call):
    fresh = tower()
    model = copy.deepcopy(fresh)
    run = lines_in(lambda: call(model))
    first = {line: number for number, line in reversed([*enumerate(run, 1)])}
    assert any("summed_weight" in line for line in first)
    for at in first.values():
        model = copy.deepcopy(fresh)
        interrupt(lambda model=model: call(model), at)
        model.zero_grad()
        with torch.no_grad():
            pair_of(model, 1).B.mul_(2)
        expected = WrittenOut(model)
        y = model(X, [0, 1, 2])
        assert_close(y, expected(X))
        y.square().sum().backward()
        expected(X).square().sum().backward()
        expected.assert_gradients()


def test_a_forward_that_fails_in_the_middle():
    model = tower()
    handle = model.layers[1].register_forward_hook(lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    handle.remove()
    pair_of(model, 2).B.data.mul_(2)
    assert_close(model(X), WrittenOut(model)(X))


def test_two_threads_compute_with_one_model():
    model, errors, done = tower(layers=4), [], threading.Event()
    expected = WrittenOut(model)
    expected(X).sum().backward()

    def run():
        while not done.is_set():
            with torch.no_grad():
                y = model(X)
            if not torch.allclose(y.double(), output, atol=1e-5):
                errors.append(y)

    output = expected(X).detach()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(30):
            model.zero_grad()
            model(X).sum().backward()
            expected.assert_gradients()
    finally:
        done.set()
        thread.join()
    assert not errors


# The verbs.


def test_threads_with_choices_of_their_own_have_sums_of_their_own():
    model, outputs, barrier = adapted(tower(), name="de"), {}, threading.Barrier(2)

    def run(name):
        with use_adapters(model, name), torch.no_grad():
            barrier.wait()
            outputs[name] = [model(X) for _ in range(100)]

    threads = [threading.Thread(target=run, args=(name,)) for name in ("default", "de")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, other in (("default", "de"), ("de", "default")):
        remove_lora(alone := copy.deepcopy(model), name=other)
        expected = alone(X)
        for y in outputs[name]:
            assert_close(y, expected)


@pytest.mark.slow
def test_what_a_choice_has_summed_is_freed_when_it_ends(without_collector):
    model = adapted(tower(), name="de")
    with use_adapters(model, "de"), torch.no_grad():
        model(X)
        chosen = [layer.lora.sums["weight"].of_choices[frozenset({"de"})] for layer in model.layers]
        sums = [weakref.ref(summed.value) for summed in chosen]
        assert all(reference() is not None for reference in sums)
    assert all(reference() is None for reference in sums)
    removed = weakref.ref(model.layers[0].lora["de"])
    del chosen
    remove_lora(model, name="de")
    gc.collect()
    assert removed() is None, "the plan of a choice that may come again holds no adapter"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_of_a_choice_has_no_sums_of_it(copied):
    model = adapted(tower(), name="de")
    with use_adapters(model, "de"):
        expected = model(X)
        copy_of = copied(model)
    assert not any(layer.lora.sums["weight"].of_choices for layer in copy_of.layers)
    with use_adapters(copy_of, "de"):
        assert same_bits(copy_of(X), expected)


@BOTH_WAYS
def test_a_choice_inside_of_a_checkpoint_and_one_that_has_ended(use_reentrant):
    model, plain = adapted(tower(), name="de"), adapted(tower("activations"), "activations", name="de")
    for each in (model, plain):
        losses = []
        for name in ("de", "default"):
            with use_adapters(each, name):
                x = X.clone().requires_grad_()
                losses.append(checkpoint(each, x, use_reentrant=use_reentrant).square().sum())
        with use_adapters(each, "de"):
            sum(losses).backward()
    assert_same_gradients(model, plain)


def test_a_list_that_is_no_batch_is_refused_whatever_the_side():
    model = adapted(tower(), name="de")
    with use_adapters(model, ["de"] * 4), pytest.raises(ValueError, match="chosen by 4 entries"):
        model(X)


def test_disabled_adapters():
    model = tower()
    plain = F.linear
    base = X
    for layer in model.layers:
        base = torch.tanh(plain(base, layer.weight, layer.bias))
    y = model(X, [0])
    with disable_lora(model):
        assert same_bits(model(X), base)
        assert_close(model(y, [1]), torch.tanh(plain(y, model.layers[1].weight, model.layers[1].bias)))
    assert_close(model(X), WrittenOut(model)(X))


@pytest.mark.parametrize("index", [0, 2])
def test_disabled_adapters_of_one_layer(index):
    model = tower()
    expected = WrittenOut(model)(X)
    model(X)
    with disable_lora(model.layers[index]):
        y = X
        for number in range(3):
            layer = model.layers[number]
            weight = layer.weight if number == index else WrittenOut(model).weight(number).float()
            y = torch.tanh(F.linear(y, weight, layer.bias))
        assert_close(model(X), y)
    assert_close(model(X), expected)


def test_merge_unmerge_and_remove():
    model = tower()
    before, base = model(X), [layer.weight.detach().clone() for layer in model.layers]
    merge_lora(model)
    assert_close(model(X), before)
    unmerge_lora(model)
    with counted_sums() as sums:
        assert same_bits(model(X), before)
    assert len(sums) == 1
    remove_lora(model.layers[0])
    assert type(model.layers[0]) is nn.Linear
    y = F.linear(
        torch.tanh(F.linear(X, model.layers[0].weight, model.layers[0].bias)), WrittenOut(model).weight(1).float()
    )
    assert_close(model(X, [0, 1]), torch.tanh(y + model.layers[1].bias))
    remove_lora(model)
    assert all(same_bits(layer.weight, weight) for layer, weight in zip(model.layers, base, strict=True))
    with counted_sums() as sums:
        model(X)
    assert not sums


def test_the_first_layer_is_replaced_and_taken_apart():
    model = tower()
    model(X)
    first = model.layers[0]
    model.layers[0] = nn.Linear(4, 4)
    del first.weight
    y = F.linear(torch.tanh(model.layers[0](X)), WrittenOut(model_without_first(model)).weight(0).float())
    assert_close(model(X, [0, 1]), torch.tanh(y + model.layers[1].bias))


def model_without_first(model):
    rest = Tower(0)
    rest.layers = model.layers[1:]
    return rest


# Weights that are computed.


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def doubled_weight(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())


def doubled_bias(layer):
    parametrize.register_parametrization(layer, "bias", Doubled())


def pruned_bias(layer):
    prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.parametrize("change", [pruned, doubled_weight, doubled_bias, pruned_bias])
@pytest.mark.parametrize("index", [0, 1])
def test_a_weight_that_is_computed_takes_the_other_side(change, index):
    models = [tower(side) for side in SIDES]
    outputs = []
    for model in models:
        model(X)
        change(model.layers[index])
        outputs.append(model(X))
    assert_close(*outputs)
    for output in outputs:
        output.sum().backward()
    trained = [[p.grad for p in trained_parameters(model)] for model in models]
    for present, expected in zip(*trained, strict=True):
        assert (present is None) == (expected is None)
        assert present is None or (present - expected).abs().max() < 1e-5


# Casts.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(dtype):
    model = tower().to(dtype)
    assert pair_of(model, 0).A.dtype == torch.float32
    expected = WrittenOut(model)
    x = X.to(dtype)
    y = model(x)
    y.float().square().sum().backward()
    output = expected(x)
    output.square().sum().backward()
    oracles.assert_close(y, output, dtype)
    expected.assert_gradients(dtype=dtype)


def test_a_base_in_fp64():
    model = tower(alpha=4).double()  # a scale that is exact
    expected = WrittenOut(model)
    y, output = model(X.double()), expected(X)
    y.square().sum().backward()
    output.square().sum().backward()
    oracles.assert_close(y, output, torch.float64)
    expected.assert_gradients()  # those of A and B are fp32


def test_autocast_casts_the_fp32_sum_once():
    layer = tower().layers[0]
    pair = layer.lora["default"]
    with torch.autocast("cpu", torch.bfloat16):
        present = summed_weight(layer, X)
        assert present.dtype == torch.bfloat16
        assert layer(X).dtype == torch.bfloat16
    total = layer.weight.double() + pair.scale * pair.B.double() @ pair.A.double()
    assert (present.double() - total).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * total.abs().max() * 1.01


def test_autocast_is_switched_between_calls_and_inside_a_forward():
    model = tower()
    expected = WrittenOut(model)
    full = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X)
        y = model(X, [0])
        with torch.autocast("cpu", enabled=False):
            y = model(y.float(), [1])
        y = model(y, [2])
    again = model(X)
    assert same_bits(again, full)
    assert half.dtype == y.dtype == torch.bfloat16
    assert_close(full, expected(X))
    for output in (half, y):
        oracles.assert_close(output, expected(X), torch.bfloat16)
    (half.float().sum() + y.float().sum() + full.sum()).backward()
    (3 * expected(X).sum()).backward()
    expected.assert_gradients(dtype=torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 for p in trained_parameters(model))


@BOTH_WAYS
def test_autocast_around_a_checkpoint(use_reentrant):
    models = [tower(side) for side in SIDES]
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(starting(), use_reentrant=use_reentrant).square().sum()
        loss.backward()
    present, expected = (gradients(model) for model in models)
    for name, gradient in expected.items():
        assert (gradient is None) == (present[name] is None)
        if gradient is not None:
            oracles.assert_close(present[name], gradient, torch.bfloat16)


def test_a_model_that_is_cast_and_cast_back():
    model = tower()
    model(X)
    model.to(torch.bfloat16)
    assert model(X.bfloat16()).dtype == torch.bfloat16
    model.float()
    assert_close(model(X), WrittenOut(model)(X))


def test_a_model_that_goes_to_the_meta_device():
    model = tower()
    model(X)
    model.to("meta")
    assert model(X.to("meta")).device.type == "meta"
    model.to_empty(device="cpu")
    model.load_state_dict(tower().state_dict())
    assert_close(model(X), WrittenOut(model)(X))


def test_layers_of_two_dtypes():
    model = tower()
    model(X)
    model.layers[1].bfloat16()
    expected = WrittenOut(model)
    y = model.layers[2](model.layers[1](model.layers[0](X).bfloat16()).float())
    output = expected.layer(2, expected.layer(1, expected.layer(0, X)))
    y.sum().backward()
    output.sum().backward()
    oracles.assert_close(y, output, torch.bfloat16)
    expected.assert_gradients(dtype=torch.bfloat16)


# Compilers and transforms.


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["weights", "auto"])
def test_it_compiles_to_one_graph(compute):
    torch.compiler.reset()
    model = tower(compute)
    expected = WrittenOut(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(X)
    y.square().sum().backward()
    expected(X).square().sum().backward()
    assert_close(y, expected(X))
    expected.assert_gradients()
    with torch.no_grad():
        pair_of(model, 1).B.mul_(2)
        assert_close(compiled(X), WrittenOut(model)(X))
    with disable_lora(model):
        base = X
        for layer in model.layers:
            base = torch.tanh(F.linear(base, layer.weight, layer.bias))
        assert_close(compiled(X), base)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_one_layer_is_compiled_and_the_others_are_not():
    torch.compiler.reset()
    model = tower()
    expected = WrittenOut(model)
    model.layers[1].compile(fullgraph=True, backend="aot_eager")
    model(X).sum().backward()
    expected(X).sum().backward()
    expected.assert_gradients()


def test_gradients_by_torch_func():
    model = tower()
    expected = WrittenOut(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model(X)
    present = grad(lambda values, x: functional_call(model, values, (x,)).sum())(parameters, X)
    expected(X).sum().backward()
    for name, gradient in present.items():
        assert_close(gradient, expected.leaves[name].grad)
    model(X)
    each = vmap(grad(lambda values, x: functional_call(model, values, (x,)).sum()), (None, 0))(parameters, X)
    for name, gradient in each.items():
        assert_close(gradient.sum(0), expected.leaves[name].grad)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_functional_call_with_other_values(mode):
    model = tower()
    with mode():
        model(X, [0])
        values = {name: 1.25 * p.detach() for name, p in model.named_parameters()}
        present, again = functional_call(model, values, (X, [1, 2])), model(X)
    twin = tower()
    twin.load_state_dict({name: value.clone() for name, value in values.items()})
    assert_close(present, WrittenOut(twin)(X, [1, 2]))
    assert_close(again, WrittenOut(model)(X))


def test_a_step_through_a_step():
    """The gradient of a loss after one step, by the values before it, as in meta-learning."""
    results = []
    for side in SIDES:
        model = tower(side)
        values = {name: p for name, p in model.named_parameters() if p.requires_grad}
        slopes = torch.autograd.grad(model(X).square().sum(), list(values.values()), create_graph=True)
        stepped = {name: p - 0.1 * slope for (name, p), slope in zip(values.items(), slopes, strict=True)}
        functional_call(model, stepped, (X + 1,)).square().sum().backward()
        results.append(model)
    assert_same_gradients(*results)


def test_forward_mode_derivatives():
    model = tower()
    model(X)
    tangent = torch.ones_like(X)
    with torch.autograd.forward_ad.dual_level():
        present = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(X, tangent))).tangent
    expected = torch.autograd.functional.jvp(WrittenOut(model), X.double(), tangent.double())[1]
    assert_close(present, expected)


@pytest.mark.slow
def test_traces_hold_the_matrices_and_not_a_sum():
    model = tower()
    model(X)
    for traced in (torch.jit.trace(model, X), make_fx(lambda x: functional_call(model, values_of(model), (x,)))(X)):
        assert_close(traced(X), WrittenOut(model)(X))


def values_of(model):
    return dict(model.named_parameters())


def test_a_trace_sees_a_step():
    model = tower()
    traced = torch.jit.trace(model, X)
    with torch.no_grad():
        pair_of(model, 1).B.mul_(2)
    assert_close(traced(X), WrittenOut(model)(X))


# Kinds of layers.

KINDS = [
    name
    for name in oracles.CASES
    if "embedding" not in name and not name.startswith(("conv3d", "conv2d-same-reflect", "conv2d-valid"))
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_against_fp64(name):
    model, x = oracles.build(name)
    dtype = model.layer.weight.dtype
    plain = copy.deepcopy(model.layer).double()
    adapted(model, r=3, alpha=6)
    pair = model.layer.lora["default"]
    A, B = (matrix.detach().double().requires_grad_() for matrix in (pair.A, pair.B))
    weight = model.layer._parameters["weight"].detach().double() + oracles.shaped(2 * B @ A, model.layer)
    x = x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, output = model(x), functional_call(plain, {"weight": weight}, (x64,))
    y.double().square().sum().backward()
    output.square().sum().backward()
    oracles.assert_close(y, output, dtype)
    for present, expected in ((pair.A.grad, A.grad), (pair.B.grad, B.grad), (x.grad, x64.grad)):
        oracles.assert_close(present, expected, torch.float32 if dtype == torch.float64 else dtype)
    with torch.no_grad():
        oracles.assert_close(model(x), output, dtype)


def test_a_convolution_that_becomes_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    adapted(model)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    twin[1].to(memory_format=torch.contiguous_format)
    x = torch.randn(2, 4, 5, 5)
    model(x).square().sum().backward()
    y = twin(x.to(memory_format=torch.channels_last))
    y.square().sum().backward()
    assert_close(y, model(x))
    assert_same_gradients(twin, model)


@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("make", [FusedBlocks, lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)])
def test_projections_in_one_weight_are_summed_from_their_own_factors(make, targets):
    """No copy of A and B is made in each step: neither zeros for the other rows, nor one matrix of all pairs."""
    model = adapted(make(), targets=targets)
    with counted_sums() as groups:
        model(torch.randn(2, 3, 4))
    factors = {id(factor) for factor in (*groups[0].sums.lefts, *groups[0].sums.rights)}
    assert factors == {id(parameter) for parameter in trained_parameters(model)}
