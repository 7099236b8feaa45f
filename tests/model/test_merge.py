"""Merge and unmerge of whole models: exact, reported, refused as a whole, and what stays behind."""

import copy
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from lightning_lora.model.merge import merge_in, unmerge_in
from lightning_lora.model.record import merged_layers
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.workspace import Workspace
from tests.helpers import oracles
from tests.helpers.oracles import any_bits, assert_same_values, same_bits, snapshot

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def adapted(*sizes, dtype=torch.float32, r=2, size=0.3, **arguments):
    """A stack of linear layers with trained adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pairs = pairwise(sizes)
        model = nn.Sequential(*(nn.Linear(one, two) for one, two in pairs)).to(dtype)
    apply_lora(model, LoRAConfig(r=r, targets="all", **arguments))
    oracles.train_by_hand(model, size)
    return model


def with_ratio(model, ratio):
    """``model`` with every B scaled so that delta's norm is ``ratio`` of the weight's."""
    for layer in model:
        adapter = layer.lora.default
        product = adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()
        adapter.B.data *= float(ratio * layer.weight.detach().double().norm() / product.norm())
    return model


def records(model):
    return [merged for _, _, merged in merged_layers(model)]


def patch_of(record):
    (patch,) = record.weights["weight"].patches
    return patch


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1e-2, 1e-1, 1.0, 1e3])
def test_the_base_comes_back_bit_for_bit_whatever_the_size_of_delta(dtype, ratio):
    model = with_ratio(adapted(40, 30, 20, dtype=dtype), ratio)
    before = snapshot(model)
    merge_lora(model)
    assert all(
        patch_of(record).nbytes() <= layer.weight.nbytes for layer, record in zip(model, records(model), strict=True)
    )
    unmerge_lora(model)
    assert_same_values(model, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d-groups", "hf-conv1d", "standardized-linear"])
def test_weights_of_special_values_come_back_bit_for_bit(dtype, case):
    model, _ = oracles.build(case)
    model.to(dtype)
    values = oracles.special_values(dtype)
    flat = model.layer.weight.data.flatten()
    flat[: len(values)] = values[: len(flat)]
    model.layer.weight.data = flat.view_as(model.layer.weight)
    oracles.adapt(model)
    before = snapshot(model)
    merge_lora(model)
    assert not same_bits(model.layer.weight, before["layer.weight"])
    unmerge_lora(model)
    assert_same_values(model, before)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["linear", "embedding", "conv1d-groups", "conv2d-channels-last", "hf-conv1d"]),
    st.sampled_from(FLOATS),
    st.integers(1, 5),
    st.floats(-6, 3),
    st.integers(0, 2**31),
)
def test_weights_of_any_bits_come_back_bit_for_bit(case, dtype, r, magnitude, seed):
    model, _ = oracles.build(case)
    model.to(dtype)
    weight = model.layer.weight
    weight.data.copy_(any_bits(tuple(weight.shape), dtype, seed))
    oracles.adapt(model, r=r)
    oracles.train_by_hand(model, size=10**magnitude, seed=seed)
    before = snapshot(model)
    merge_lora(model)
    unmerge_lora(model)
    assert_same_values(model, before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium precision": lambda: matmul_precision("medium"),
    "one thread": lambda: threads(1),
    "two threads": lambda: threads(2),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("other", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_settings_that_change_between_merge_and_unmerge_change_no_bit(dtype, other):
    model = adapted(300, 257, dtype=dtype, r=8)
    before, twin = snapshot(model), copy.deepcopy(model)
    with threads(1):
        merge_lora(model)
    with other():
        merge_lora(twin)
        assert same_bits(twin[0].weight, model[0].weight)
        unmerge_lora(model)
    with threads(1):
        unmerge_lora(twin)
    assert_same_values(model, before)
    assert_same_values(twin, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_on_a_gpu_a_merge_has_the_bits_of_a_cpu_and_the_weights_stay_where_they_are(dtype):
    gpu = torch.device("cuda", 0)
    model = adapted(300, 257, 40, dtype=dtype, r=8)
    before, there, moved = snapshot(model), copy.deepcopy(model), copy.deepcopy(model).to(gpu)
    lost = merge_lora(model)
    assert merge_in(there, Workspace(gpu)) == pytest.approx(lost, rel=1e-3)
    merge_lora(moved)
    assert there[0].weight.device.type == "cpu"
    for index in range(2):
        assert same_bits(there[index].weight, model[index].weight)
        assert same_bits(moved[index].weight.cpu(), model[index].weight)
    unmerge_lora(there)  # each undone elsewhere than it was made
    unmerge_in(model, Workspace(gpu))
    unmerge_lora(moved.cpu())
    for each in (there, model, moved):
        assert_same_values(each, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_for_the_way_back_is_small_where_delta_is(dtype):
    model = with_ratio(adapted(128, 128, dtype=dtype), 1e-3)
    merge_lora(model)
    (record,) = records(model)
    assert patch_of(record).nbytes() < 0.05 * model[0].weight.nbytes


def test_the_loss_by_rounding_is_reported_for_each_layer():
    model = with_ratio(adapted(64, 48, 32, dtype=torch.bfloat16), 1e-2)
    layers = {
        str(index): (
            layer.weight.detach().double(),
            layer.lora.default.B.detach().double() @ layer.lora.default.A.detach().double(),
        )
        for index, layer in enumerate(model)
    }
    lost = merge_lora(model)
    assert list(lost) == ["0", "1"]
    for name, (weight, delta) in layers.items():
        kept = model[int(name)].weight.detach().double() - weight
        assert lost[name] == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-3)
        assert 0.05 < lost[name] < 1


def test_the_product_of_an_fp64_base_is_made_in_fp64():
    model = adapted(40, 30, dtype=torch.float64, r=3, alpha=1.0)  # a scale of 1 / 3, which no float holds
    layer = model[0]
    A, B = (matrix.detach().double() for matrix in (layer.lora.default.A, layer.lora.default.B))
    expected = layer.weight.detach() + B @ A / 3
    merge_lora(model)
    oracles.assert_close(layer.weight, expected, torch.float64)


def test_no_loss_is_reported_where_nothing_is_to_be_lost():
    model = adapted(4, 3, dtype=torch.bfloat16, size=0.0)
    before = snapshot(model)
    assert merge_lora(model) == {"0": 0.0}
    assert same_bits(model[0].weight, before["0.weight"])


def test_merging_twice_adds_nothing():
    model = adapted(5, 4, 3)
    merge_lora(model)
    merged = snapshot(model)
    assert merge_lora(model) == {}
    assert_same_values(model, merged)


def test_unmerging_twice_takes_nothing_away():
    model = adapted(5, 4, 3)
    before = snapshot(model)
    merge_lora(model)
    unmerge_lora(model)
    unmerge_lora(model)
    assert_same_values(model, before)


def test_merge_gives_the_model_its_plain_form_back():
    plain = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    plain[0].weight.requires_grad_(False)
    model = copy.deepcopy(plain)
    apply_lora(model, LoRAConfig(targets="all"))
    merge_lora(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags == {"0.weight": False, "0.bias": True, "1.weight": True, "1.bias": True}
    plain.load_state_dict(model.state_dict())


def test_unmerge_trains_the_same_parameters_again():
    model = adapted(5, 4, 3, bias="lora_only")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    merge_lora(model)
    unmerge_lora(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert len(trained) == 6


def test_no_sequence_of_merge_and_unmerge_applies_an_adapter_twice():
    model, x = adapted(5, 4, 3), torch.ones(5)
    output = model(x)
    for step in (merge_lora, merge_lora, unmerge_lora, merge_lora, unmerge_lora, unmerge_lora, merge_lora):
        step(model)
        oracles.assert_close(model(x), output, torch.float32)


@pytest.mark.parametrize("mode", [True, False])
def test_neither_train_nor_eval_merges_or_unmerges(mode):
    model = adapted(5, 4)
    before = snapshot(model)
    model.train(mode)
    assert_same_values(model, before)
    merge_lora(model)
    merged = snapshot(model)
    model.train(not mode)
    assert_same_values(model, merged)


def test_undo_is_given_by_name():
    model = adapted(4, 4)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"`undo` must be given by name, but got False by position. Write `undo=False`"):
        merge_lora(model, False)
    with pytest.raises(TypeError, match=r"`undo` must be given by name, but got True by position. Write `undo=True`"):
        merge_lora(model, {"default": 0.5}, True)
    with pytest.raises(
        TypeError, match=r"`weights` must be a dict from names of adapters to numbers, .* got 'default'"
    ):
        merge_lora(model, "default")
    with pytest.raises(TypeError, match=r"`weights\['default'\]` must be a number"):
        merge_lora(model, {"default": "half"})
    with pytest.raises(TypeError, match=r"`undo` must be a bool, but got None"):
        merge_lora(model, undo=None)
    assert_same_values(model, before)


def test_a_merge_that_is_not_to_be_undone_leaves_the_plain_model():
    model = adapted(5, 4)
    layer = model[0]
    expected = (
        layer.weight.detach().double() + layer.lora.default.B.detach().double() @ layer.lora.default.A.detach().double()
    )
    merge_lora(model, undo=False)
    oracles.assert_close(model[0].weight, expected, torch.float32)
    assert [vars(module).keys() for module in model.modules()] == [
        vars(module).keys() for module in nn.Sequential(nn.Linear(5, 4)).modules()
    ]
    assert list(lora_parameters(model)) == []


def test_an_earlier_merge_can_still_be_made_the_base():
    model = adapted(5, 4)
    merge_lora(model)
    merged = snapshot(model)
    merge_lora(model, undo=False)
    assert_same_values(model, merged)
    with pytest.raises(ValueError, match=r"no merged adapters: it was never merged, or with `undo=False`"):
        unmerge_lora(model)
    apply_lora(model, LoRAConfig(r=1, targets=["0"]))
    remove_lora(model)
    assert_same_values(model, merged)


def test_what_has_no_adapters_cannot_be_merged_or_unmerged():
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"The model has no adapters to merge: call `apply_lora`, or load"):
        merge_lora(model)
    with pytest.raises(ValueError, match=r"The model has no merged adapters: it was never merged"):
        unmerge_lora(model)


def test_a_model_without_values_cannot_be_merged():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, device="meta"))
    apply_lora(model, LoRAConfig(targets="all"))
    oracles.train_by_hand(model[:1])
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"`1\.weight` is on the meta device, without values .*load the base first"):
        merge_lora(model)
    assert same_bits(model[0].weight, weight)
    assert hasattr(model[0], "lora")


def test_a_bare_layer_on_the_meta_device_is_named_by_its_weight():
    layer = nn.Linear(5, 4, device="meta")
    apply_lora(layer, LoRAConfig(targets="all"))
    with pytest.raises(ValueError, match=r"^`weight` is on the meta device"):
        merge_lora(layer)


def refuse_to_unmerge(model, words):
    """Assert that an unmerge fails with these words and changes nothing on any layer."""
    values, classes = snapshot(model), [type(module) for module in model.modules()]
    pairs = {name: (parameter, parameter.detach().clone()) for name, parameter in lora_parameters(model)}
    kept = [(id(record.adapters), record.weights["weight"].checksum) for record in records(model)]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=words):
        unmerge_lora(model)
    assert_same_values(model, values)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [(id(record.adapters), record.weights["weight"].checksum) for record in records(model)] == kept
    now = dict(lora_parameters(model))
    assert all(now[name] is parameter and same_bits(parameter, value) for name, (parameter, value) in pairs.items())


CHANGES = {
    "one value": lambda weight: weight[0, 0].add_(1),
    "the sign of a zero": lambda weight: weight[-1, -1].copy_(-0.0),
    "a swap of rows": lambda weight: weight.copy_(weight.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_changed_weight_is_named_and_nothing_is_unmerged(index, change):
    model = adapted(5, 4, 4, 3)
    for layer in model:
        layer.lora.default.B.data[-1] = 0
        layer.weight.data[-1, -1] = 0
    merge_lora(model)
    change(model[index].weight.data)
    refuse_to_unmerge(model, rf"`{index}\.weight` is not what the merge left there.* Nothing was changed\..*undo=False")


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_model_is_refused_and_cast_back_it_unmerges_only_if_no_bit_was_lost(cast):
    model = adapted(5, 4, 3)
    before = snapshot(model)
    merge_lora(model)
    model.to(cast)
    refuse_to_unmerge(model, r"`0\.weight` is not what the merge left there: it was changed, cast or loaded since")
    model.to(torch.float32)
    if cast == torch.float64:
        unmerge_lora(model)
        assert_same_values(model, before)
    else:
        refuse_to_unmerge(model, r"`0\.weight` is not what the merge left there")


def test_a_base_checkpoint_loaded_over_the_merged_weights_is_noticed():
    model = adapted(5, 4, 3)
    merge_lora(model)
    model.load_state_dict(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).state_dict())
    refuse_to_unmerge(model, r"`0\.weight` is not what the merge left there")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_record_that_does_not_fit_is_named_and_nothing_is_unmerged(index):
    model = adapted(5, 4, 4, 3)
    merge_lora(model)
    records(model)[index].adapters["default"].A.data.add_(1)
    refuse_to_unmerge(model, rf"`{index}\.weight` is not what .* or its merge record was, .* Nothing was changed\.")


def test_a_refused_unmerge_can_be_repaired():
    model = adapted(5, 4, 3)
    before = snapshot(model)
    merge_lora(model)
    kept = model[1].weight.detach().clone()
    model[1].weight.data.zero_()
    refuse_to_unmerge(model, r"`1\.weight` is not what")
    model[1].weight.data.copy_(kept)
    unmerge_lora(model)
    assert_same_values(model, before)


def test_what_the_record_keeps_is_private():
    model = adapted(5, 4)
    live = dict(lora_parameters(model))
    values = {name: parameter.detach().clone() for name, parameter in live.items()}
    merge_lora(model)
    assert {name: same_bits(parameter, values[name]) for name, parameter in lora_parameters(model)} == {
        "0.lora.default.A": True,
        "0.lora.default.B": True,
    }
    for parameter in model.parameters():
        assert not any(parameter is other for other in live.values())


def test_a_module_under_two_names_is_merged_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    oracles.train_by_hand(model)
    adapter, x = layer.lora.default, torch.ones(4, dtype=torch.float64)
    weight = layer.weight.detach().double() + adapter.B.detach().double() @ adapter.A.detach().double()
    bias = layer.bias.detach().double()
    expected = weight @ torch.tanh(weight @ x + bias) + bias
    before = snapshot(model)
    oracles.assert_close(model(x.float()), expected, torch.float32)
    assert list(merge_lora(model)) == ["0"]
    oracles.assert_close(model(x.float()), expected, torch.float32)
    unmerge_lora(model)
    assert_same_values(model, before)


def test_a_part_of_a_model_merges_and_unmerges_by_itself():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    oracles.train_by_hand(model)
    before, flags = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    merge_lora(model[0])
    assert hasattr(model[1], "lora")
    assert not hasattr(model[0][0], "lora")
    unmerge_lora(model[0])
    assert_same_values(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_unmerging_through_a_wrapper_freezes_nothing_outside_the_adapted_part():
    wrapper = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    apply_lora(wrapper[0], LoRAConfig(r=2, targets="all"))
    flags = {name: p.requires_grad for name, p in wrapper.named_parameters()}
    assert flags["1.weight"]
    merge_lora(wrapper)
    unmerge_lora(wrapper)
    assert {name: p.requires_grad for name, p in wrapper.named_parameters()} == flags


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_merge_that_is_interrupted_leaves_everything_as_it_was(after, monkeypatch):
    model = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 3))
    apply_lora(model, LoRAConfig(r=2, targets=["0", "1"]))
    oracles.train_by_hand(model)
    before, calls = snapshot(model), []
    merge_delta = exact.merge_delta

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return merge_delta(*arguments)

    monkeypatch.setattr(exact, "merge_delta", interrupted)
    if after < 3:
        with pytest.raises(KeyboardInterrupt):
            merge_lora(model)
        assert_same_values(model, before)
        assert [len(layer.lora.all_pairs()) for layer in model] == [1, 2]
    else:
        assert list(merge_lora(model)) == ["0", "1"]
