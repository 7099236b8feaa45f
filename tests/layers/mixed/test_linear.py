"""Linear layers in mixed batches by the op for GPUs: nothing stale, nothing kept, and the same as sample by sample."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from itertools import pairwise, product

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    remove_lora,
    use_adapters,
)
from lightning_lora.layers.mixed import copies as copies_module
from lightning_lora.layers.mixed import linear as linear_module
from lightning_lora.ops import mixed_linear as op
from tests.helpers.models import FusedBlock, Tower
from tests.helpers.oracles import saved_and_loaded
from tests.helpers.selection import slow_except
from tests.helpers.several import fill, mixed_as_alone

RANKS = {"fr": 2, "de": 2, "es": 2}
ENTRIES = ["fr", "de", None, {"fr": 0.5, "es": 2.0}, "de"]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).double()
MODES = {"train": nullcontext, "no-grad": torch.no_grad, "inference": torch.inference_mode}
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Let the op be used on a CPU; the value gets an entry at each call of it."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))
    made, plain = [], op.mixed_linear
    monkeypatch.setattr("lightning_lora.ops.linear.mixed_linear", lambda *args: made.append(1) or plain(*args))
    return made


@pytest.fixture
def copied(monkeypatch):
    """The number of layers that were copied, for each time that something was."""
    counts, plain = [], copies_module.CopyGroup.copy

    def counted(group, *arguments):
        counts.append(len([1 for reference in group.members if reference() is not None]))
        return plain(group, *arguments)

    monkeypatch.setattr(copies_module.CopyGroup, "copy", counted)
    return counts


def several(ranks=RANKS, widths=(4, 4, 4, 4), **config):
    torch.default_generator.manual_seed(0)
    model = Tower(0).double()
    for inside, outside in pairwise(widths):
        model.layers.append(nn.Linear(inside, outside).double())  # A and B stay in fp32, so the copies are casts
    for name, r in ranks.items():
        apply_lora(model, LoRAConfig(name=name, r=r, alpha=2 * r, targets="all", **config), compute="activations")
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model


def written_out(model, x, order=(0, 1, 2), entries=ENTRIES):
    """Each sample alone in fp64."""
    rows = []
    for row, entry in zip(x.double(), entries, strict=True):
        weights = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
        for layer in (model.layers[index] for index in order):
            total = layer._parameters["weight"].double()
            for name, c in weights.items():
                pair = layer.lora[name]
                total = total + c * pair.scale * pair.B.double() @ pair.A.double()
            row = torch.tanh(nn.functional.linear(row, total, layer.bias.double()))
        rows.append(row)
    return torch.stack(rows)


def assert_close(y, expected):
    rounding = 1e-5 if torch.float32 in (y.dtype, expected.dtype) else 1e-11
    torch.testing.assert_close(y.double(), expected.double(), rtol=rounding, atol=rounding)


def assert_acts(model, x=X, order=(0, 1, 2), trains=False):
    """That the output, and the gradients if it ``trains``, are those of each sample alone."""
    y, expected = model(x, list(order)), written_out(model, x, order)
    assert_close(y, expected)
    if trains:
        parameters = [parameter for _, parameter in lora_parameters(model) if parameter.requires_grad]
        got = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
        for gradient, other in zip(got, wanted, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                assert_close(gradient, other)


def step(model):
    parameters = list(model.layers[1].lora["fr"].parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.5).step()


def load(model, assign=False):
    model.load_state_dict({key: 1.25 * value for key, value in model.state_dict().items()}, assign=assign)


def load_values(model):
    load_lora_state_dict(model, {key: 2 * value for key, value in lora_state_dict(model, "de").items()}, "de")


def give_data(model):
    model.layers[1].lora["fr"].A.data = torch.full((2, 4), 0.25)


def give_another_rank(model):
    pair = model.layers[1].lora["fr"]
    pair.A.data, pair.B.data = torch.full((4, 4), 0.25), torch.full((4, 4), 0.5)


def write_in_place(model):
    with torch.no_grad():
        model.layers[1].lora["es"].B.mul_(3)


def change_scale(model):
    model.layers[1].lora["de"].scale *= 2


def replace_parameter(model):
    model.layers[1].lora["de"].A = nn.Parameter(torch.ones(2, 4))


def replace_pair(model):
    pair = copy.deepcopy(model.layers[1].lora["fr"])
    pair.B.data.mul_(3)
    model.layers[1].lora["fr"] = pair


def swap_names(model):
    modules = model.layers[1].lora._modules
    modules["fr"], modules["de"] = modules["de"], modules["fr"]


def write_base(model):
    with torch.no_grad():
        model.layers[1].weight.add_(0.25)


CHANGES = [
    *(step, load, lambda model: load(model, assign=True), load_values, give_data, give_another_rank),
    *(write_in_place, change_scale, replace_parameter, replace_pair, swap_names, write_base),
]
# The layers that are called before the change of layer 1, and after it.
ORDERS = {"all": ((0, 1, 2), (0, 1, 2)), "left out": ((0, 2), (2, 1)), "in the middle": ((0, 1), (2, 1))}


@pytest.mark.parametrize(
    ("change", "orders", "mode"),
    slow_except(
        [*product(CHANGES, ORDERS, ["train"]), *product(CHANGES, ["all"], MODES)], product(CHANGES, ORDERS, MODES)
    ),
)
def test_a_change_is_seen_by_the_next_call(change, orders, mode, calls):
    model, (before, after) = several(), ORDERS[orders]
    with use_adapters(model, ENTRIES):
        with MODES[mode]():
            model(X, list(before))
        change(model)
        with MODES[mode]():
            assert_acts(model, order=after, trains=mode == "train")
    assert calls


@every_mode
def test_a_write_through_data_is_seen_by_the_next_forward(mode):
    """No version tells of it, so layers of the same pass may not see it."""
    model = several()
    with use_adapters(model, ENTRIES), MODES[mode]():
        for _ in range(2):
            assert_acts(model)
            for _, parameter in lora_parameters(model):
                parameter.data.mul_(1.5)


@every_mode
def test_what_one_choice_has_copied_is_right_for_the_next(mode):
    model, others = several(), ["de", "es", "es", {"fr": -1.0}, None]
    with MODES[mode]():
        for entries in (ENTRIES, others, ENTRIES):
            with use_adapters(model, entries):
                assert_close(model(X), written_out(model, X, entries=entries))
            write_in_place(model)


@every_mode
@pytest.mark.parametrize("ranks", [RANKS, {"fr": 2, "de": 1, "es": 3}], ids=["one rank", "ranks"])
def test_layers_of_several_forms_are_copied_together(ranks, mode, copied):
    model = several(ranks, widths=(4, 6, 4, 6, 6, 3))
    with use_adapters(model, ENTRIES), MODES[mode]():
        for _ in range(2):
            assert_acts(model, order=range(5), trains=mode == "train")
            write_in_place(model)
    assert copied == [5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 600])
def test_sequences_short_and_long(positions, calls):
    """Each side of the rule that chooses the products."""
    model, x = several(), torch.randn(5, positions, 4, dtype=torch.float64)
    with use_adapters(model, ENTRIES):
        y = model(x)
        for row, entry in enumerate(ENTRIES):
            assert_close(y[row], written_out(model, x[row], entries=[entry] * positions))
    assert len(calls) == 3


def test_gradients_after_passes_without_them_and_the_other_way_round(calls):
    model = several()
    with use_adapters(model, ENTRIES):
        for mode in ("inference", "no-grad", "train", "inference", "train", "no-grad"):
            with MODES[mode]():
                assert_acts(model, order=(0, 1), trains=mode == "train")
    assert len(calls) == 12


def test_a_pass_without_gradients_leaves_what_a_backward_pass_reads(calls):
    model = several()
    with use_adapters(model, ENTRIES):
        y, expected = model(X), written_out(model, X)
        wanted = torch.autograd.grad(expected.sum(), [parameter for _, parameter in lora_parameters(model)])
        with torch.no_grad():
            for _, parameter in lora_parameters(model):
                parameter.mul_(2)
            model(X)
    got = torch.autograd.grad(y.sum(), [parameter for _, parameter in lora_parameters(model)])
    for gradient, other in zip(got, wanted, strict=True):
        assert_close(gradient, other)


@pytest.mark.parametrize("frozen", ["A", "B", "fr"])
def test_what_is_frozen_and_unfrozen(frozen):
    model = several()
    with use_adapters(model, ENTRIES):
        for trains in (True, False, True):
            for name, parameter in lora_parameters(model):
                parameter.requires_grad_(trains or frozen not in name.split("."))
            assert_acts(model, trains=True)


@every_mode
def test_neighbours_are_copied_once_for_a_forward_pass(mode, copied):
    model = several()
    with MODES[mode](), use_adapters(model, ENTRIES):
        for count in (1, 2, 3):
            model(X)
            assert copied == [3] * count


def test_a_recomputation_copies_again_and_has_the_gradients_of_the_first_pass(copied):
    model = several()
    with use_adapters(model, ENTRIES):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
    with use_adapters(model, "fr"):
        got = torch.autograd.grad(y.sum(), [parameter for _, parameter in lora_parameters(model)])
    wanted = torch.autograd.grad(written_out(model, X).sum(), [parameter for _, parameter in lora_parameters(model)])
    for gradient, other in zip(got, wanted, strict=True):
        assert_close(gradient, other)
    assert copied == [3, 3]


@pytest.mark.slow
def test_what_backward_reads_is_freed_with_the_graph(copied):
    model, made = several(), []
    plain = copies_module.copies_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            copies_module, "copies_of", lambda *args: made.append(weakref.ref((c := plain(*args))[0].flat)) or c
        )
        with use_adapters(model, ENTRIES):
            y = model(X)
            model(X, [1])
        y.sum().backward()
        del y
    gc.collect()
    assert len(made) == 2 and all(reference() is None for reference in made)


def test_small_copies_stay_for_the_next_pass_without_gradients_and_large_ones_do_not(monkeypatch):
    for limit, stays in ((2**20, True), (1, False)):
        monkeypatch.setattr(copies_module, "MAX_KEPT", limit)
        model, kept = several(), []
        for _ in range(2):
            with use_adapters(model, ENTRIES), torch.no_grad():
                model(X)
            (layer,) = model.layers[0].lora.mixed.values()
            kept.append(layer.copies)
        assert (kept[0] is not None) == stays and kept[0] is kept[1]


def test_large_layers_are_copied_one_by_one(monkeypatch, copied):
    monkeypatch.setattr(linear_module, "MAX_ELEMENTS", 1)
    model = several()
    with use_adapters(model, ENTRIES):
        assert_acts(model)
    assert copied == [1, 1, 1]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, saved_and_loaded])
def test_a_copy_knows_nothing_and_goes_its_own_way(copy_of):
    model = several()
    with use_adapters(model, ENTRIES), torch.no_grad():
        model(X)
        other = copy_of(model)
    assert not any(layer.lora.mixed for layer in other.layers)
    write_in_place(other)
    for each in (model, other):
        with use_adapters(each, ENTRIES), torch.no_grad():
            assert_acts(each)


@pytest.mark.slow
def test_a_model_that_is_moved_leaves_no_copies_behind():
    model = several()
    with use_adapters(model, ENTRIES), torch.no_grad():
        model(X)
        (layer,) = model.layers[0].lora.mixed.values()
        memory = weakref.ref(layer.copies.flat)
        del layer
        model.to("cpu")
        gc.collect()
        assert memory() is None
        assert_acts(model)


@pytest.mark.slow
def test_an_adapter_that_is_removed_is_freed_and_one_that_is_added_acts():
    model, entries = several(), ["fr", "es", None, "fr", "es"]
    with use_adapters(model, ENTRIES), torch.no_grad():
        model(X)
    removed = weakref.ref(model.layers[0].lora["de"])
    remove_lora(model, name="de")
    gc.collect()
    assert removed() is None
    apply_lora(model, LoRAConfig(name="it", r=2, targets="all"), compute="activations")
    for chosen in (entries, ["it", *entries[1:]]):
        with use_adapters(model, chosen):
            assert_close(model(X), written_out(model, X, entries=chosen))


def test_a_hook_of_a_pair_is_called(calls):
    model, seen = several(), []
    with use_adapters(model, ENTRIES):
        assert_acts(model)
        handle = model.layers[1].lora["de"].register_forward_hook(lambda *_: seen.append(1))
        assert_acts(model)
        assert seen == [1]
        handle.remove()
        assert_acts(model)
    assert seen == [1] and len(calls) == 8


def test_a_hook_of_all_modules_sees_each_pair(calls):
    model, seen = several(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    with use_adapters(model, ENTRIES):
        assert_acts(model)
    handle.remove()
    assert set(seen) >= {pair for layer in model.layers for pair in layer.lora.values()} and not calls


def test_parts_of_a_fused_layer_act_in_their_own_rows(calls):
    model = FusedBlock(8)
    for name, targets in {"fr": ["qkv.k"], "de": "qv"}.items():
        apply_lora(model, LoRAConfig(name=name, r=2, targets=targets), compute="activations")
    fill(model)
    mixed_as_alone(model, torch.randn(4, 5, 8), ["fr", "de", None, "fr"])
    assert not calls


def test_dropout_follows_the_mode_and_the_probability(calls):
    model = several(dropout=0.5)
    entries = ["fr", "de", None, "fr", "es"]
    with use_adapters(model, entries):
        assert not torch.equal(model(X), model(X))
        model.eval()
        assert_close(model(X), written_out(model, X, entries=entries))
        model.train()
        model.layers[0].lora["fr"].dropout = 0.0
        count = len(calls)
        model(X, [0])
        assert len(calls) == count, "each pair has a dropout of its own"
        for layer in model.layers:
            for pair in layer.lora.values():
                pair.dropout = 0.0
        assert_close(model(X), written_out(model, X, entries=entries))


def test_threads_choose_for_themselves():
    model, outputs, barrier = several(), {}, threading.Barrier(2)
    chosen = {"first": ENTRIES, "second": [*ENTRIES[1:], ENTRIES[0]]}

    def run(key):
        with use_adapters(model, chosen[key]), torch.no_grad():
            barrier.wait()
            outputs[key] = [model(X) for _ in range(50)]

    threads = [threading.Thread(target=run, args=(key,)) for key in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, entries in chosen.items():
        expected = written_out(model, X, entries=entries)
        for y in outputs[key]:
            assert_close(y, expected)


def give_the_layer_another_dtype(adapters):
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()


def give_one_pair_another_dtype(adapters):
    give_the_layer_another_dtype(adapters["fr"])


def compute_A(adapters):
    register_parametrization(adapters["fr"], "A", nn.Identity())


@pytest.mark.parametrize(
    ("change", "count"), [(give_the_layer_another_dtype, 2), (give_one_pair_another_dtype, 2), (compute_A, 1)]
)
def test_a_layer_that_is_not_like_the_others_is_copied_by_itself_or_not(change, count, copied):
    model = several()
    change(model.layers[1].lora)
    with use_adapters(model, ENTRIES):
        assert_acts(model, trains=True)
    assert len(copied) == count


def test_a_list_that_is_no_batch_is_refused():
    model = several()
    with use_adapters(model, ENTRIES[:4]), pytest.raises(ValueError, match="chosen by 4 entries"):
        model(X)
