"""What an adapter is as data: which entries, under which names, and that loading is all or nothing."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    unmerge_lora,
)
from tests.helpers import models, oracles
from tests.helpers.oracles import ADAPTERS, INDEX, adapted, assert_same_values, net, same_bits, snapshot, train
from tests.helpers.several import THREE, fill, with_adapters

ALL = {"r": 2, "targets": ["body.*"], "bias": "lora_only", "also_train": ["head", "scale"]}
STATISTICS = ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]


def test_parameters_of_the_adapters_come_with_their_names_and_as_they_are():
    model = adapted()
    found = dict(lora_parameters(model))
    assert list(found) == ADAPTERS
    assert all(model.get_parameter(name) is parameter for name, parameter in found.items())
    assert list(lora_parameters(net())) == []


def test_a_plain_model_takes_the_base_of_an_adapted_one_and_what_to_write_instead():
    model = train(adapted()).eval()
    plain, written = net().eval(), model.state_dict()
    result = plain.load_state_dict(written, strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == ADAPTERS
    base = net().eval()
    base.load_state_dict({key: value for key, value in written.items() if key not in ADAPTERS})
    assert torch.equal(plain(INDEX), base(INDEX)) and not torch.allclose(plain(INDEX), model(INDEX))
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(INDEX), model(INDEX))
    again = net()
    apply_lora(again, oracles.BODY)
    load_lora_state_dict(again, lora_state_dict(model))
    assert torch.equal(again.eval()(INDEX), model(INDEX))
    assert all(name in lora_state_dict.__doc__ for name in ("strict=False", "unexpected_keys", "merged_state_dict"))


def test_names_are_the_users_whatever_wraps_the_model():
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", adapted())
    assert [name for name, _ in lora_parameters(wrapped)] == ADAPTERS
    assert sorted(lora_state_dict(wrapped)) == ADAPTERS


def test_an_untrained_state_holds_the_adapters_alone():
    assert sorted(lora_state_dict(adapted())) == ADAPTERS


@pytest.mark.parametrize(
    ("arguments", "beside"),
    [
        ({}, []),
        ({"bias": "lora_only"}, ["body.0.bias", "body.2.bias"]),
        ({"bias": "all"}, ["body.0.bias", "body.1.bias", "body.2.bias", "head.bias"]),
        ({"also_train": ["head", "scale"]}, ["head.weight", "head.bias", "scale"]),
        ({"also_train": ["embed.weight"]}, ["embed.weight"]),
    ],
    ids=str,
)
def test_a_trained_state_holds_what_trains_and_the_buffers_that_moved(arguments, beside):
    model = train(adapted(r=2, targets=["body.*"], **arguments))
    state = lora_state_dict(model)
    assert sorted(state) == sorted([*ADAPTERS, *beside, *STATISTICS, "steps"])
    own = model.state_dict()
    assert all(same_bits(value, own[key]) and not value.requires_grad for key, value in state.items())


def test_only_the_buffers_that_moved_are_in_it():
    model = adapted()
    model.body[1].running_mean += 1
    assert sorted(lora_state_dict(model)) == sorted([*ADAPTERS, "body.1.running_mean"])
    model.body[1].running_mean -= 1
    assert sorted(lora_state_dict(model)) == ADAPTERS


def test_casting_a_model_moves_no_buffer():
    assert sorted(lora_state_dict(adapted().to(torch.bfloat16))) == ADAPTERS


def test_buffers_that_no_state_dict_holds_are_never_in_it():
    model = net()
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    apply_lora(model, LoRAConfig(r=2, targets=["body.*"]))
    model.cache += 1
    assert sorted(lora_state_dict(model)) == ADAPTERS


def test_a_merged_model_gives_the_same_state():
    model = train(adapted(**ALL))
    before = {key: value.clone() for key, value in lora_state_dict(model).items()}
    merge_lora(model)
    state = lora_state_dict(model)
    assert state.keys() == before.keys()
    assert all(same_bits(state[key], before[key]) for key in before)
    assert [name for name, _ in lora_parameters(model)] == ADAPTERS


def test_a_plain_model_has_no_adapter_as_data():
    with pytest.raises(ValueError, match="has no adapters, so there is no adapter to save: call `apply_lora` first"):
        lora_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_a_state_makes_a_fresh_base_the_trained_model(merged):
    model = train(adapted(**ALL)).eval()
    expected, values = model(INDEX), snapshot(model)
    if merged:
        merge_lora(model)
    buffer = io.BytesIO()
    torch.save(lora_state_dict(model), buffer)
    buffer.seek(0)
    other = net().eval()
    apply_lora(other, LoRAConfig(**ALL))
    load_lora_state_dict(other, torch.load(buffer, weights_only=True))
    assert_same_values(other, values)
    assert same_bits(other(INDEX), expected)


def test_loading_keeps_the_parameter_objects_and_copies():
    model, other = train(adapted(**ALL)), adapted(**ALL)
    objects, state = dict(other.named_parameters()), lora_state_dict(model)
    load_lora_state_dict(other, state)
    assert all(parameter is objects[name] for name, parameter in other.named_parameters())
    state["scale"].fill_(99)
    assert not (other.scale == 99).any()


def test_buffers_that_a_state_does_not_name_get_their_first_values_back():
    untrained = {key: value.clone() for key, value in lora_state_dict(adapted()).items()}
    model = train(adapted())
    load_lora_state_dict(model, untrained)
    assert_same_values(model, snapshot(adapted()))


def fitting():
    return {key: value.clone() for key, value in lora_state_dict(train(adapted(**ALL))).items()}


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


WRONG = {
    "no A": (without("body.0.lora.default.A"), r"lacks `body\.0\.lora\.default\.A` \(1 missing, 0 unknown\)"),
    "no B": (without("body.2.lora.default.B"), r"lacks `body\.2\.lora\.default\.B` \(1 missing, 0 unknown\)"),
    "no head": (without("head.weight"), r"lacks `head\.weight`"),
    "no bias": (without("body.0.bias"), r"lacks `body\.0\.bias`"),
    "nothing": (lambda state: {}, r"lacks `.*` \(9 missing, 0 unknown\)"),
    "other layer": (
        lambda state: state | {"tail.lora.default.A": torch.ones(2, 4)},
        r"has `tail\.lora\.default\.A`, which this model has not \(0 missing, 1 unknown\)",
    ),
    "other name": (
        lambda state: {key.replace("default", "other"): value for key, value in state.items()},
        r"lacks `body\.0\.lora\.default\.A` \(4 missing, 4 unknown\).* `name` the same",
    ),
    "other rank": (
        lambda state: state | {"body.0.lora.default.A": torch.ones(3, 4)},
        r"`body\.0\.lora\.default\.A` has shape \(3, 4\), but the model needs \(2, 4\)\. Was `r` the same",
    ),
    "a shape that would broadcast": (
        lambda state: state | {"body.0.lora.default.A": torch.ones(1, 4)},
        r"`body\.0\.lora\.default\.A` has shape \(1, 4\), but the model needs \(2, 4\)",
    ),
    "a full checkpoint": (
        lambda state: train(adapted(**ALL)).state_dict() | {"embed.weight": torch.ones(7, 4)},
        r"`(embed|body\.0)\.weight`",
    ),
    "a weight of the base": (lambda state: state | {"embed.weight": torch.ones(7, 4)}, r"`embed\.weight`"),
    "no tensor": (lambda state: state | {"body.0.lora.default.A": None}, r"`body\.0\.lora\.default\.A`"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, words):
    model = train(adapted(**ALL), steps=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        load_lora_state_dict(model, change(fitting()))
    assert_same_values(model, before)


def test_the_ways_out_are_named_where_nothing_can_be_loaded():
    model = adapted()
    state = lora_state_dict(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"no live adapters to load into: call `unmerge_lora\(model\)` first"):
        load_lora_state_dict(model, state)
    with pytest.raises(ValueError, match=r"no adapters to load into: call `apply_lora` with its configuration first"):
        load_lora_state_dict(net(), state)


def test_a_state_loads_into_a_model_of_another_dtype_without_touching_a_bit_of_a_and_b():
    model, other = train(adapted()), adapted().to(torch.bfloat16)
    load_lora_state_dict(other, lora_state_dict(model))
    for (_, one), (_, two) in zip(lora_parameters(model), lora_parameters(other), strict=True):
        assert same_bits(one, two)


def shared_layer():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    oracles.train_by_hand(model)
    return model


def test_a_module_under_two_names_gives_the_same_state_live_and_merged():
    model = shared_layer()
    live = {key: value.clone() for key, value in lora_state_dict(model).items()}
    merge_lora(model)
    merged = {key: value.clone() for key, value in lora_state_dict(model).items()}
    assert merged.keys() == live.keys()
    unmerge_lora(model)
    expected = snapshot(model)
    model[0].lora.default.B.data.zero_()
    load_lora_state_dict(model, merged)
    assert_same_values(model, expected)


def test_the_state_shares_nothing_with_a_copy_of_the_model():
    model = train(adapted(**ALL))
    other = copy.deepcopy(model)
    before = snapshot(model)
    for value in lora_state_dict(other).values():
        value.zero_()
    assert_same_values(model, before)
    assert other.scale.abs().sum() == 0  # as torch's own state_dict, it is no copy


class Counting(nn.Linear):
    """Keeps something of its own in the file, and can refuse what it is given."""

    count, fails = 0, False

    def get_extra_state(self):
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        if self.fails and int(state) != self.count:
            raise OSError("planned failure")
        self.count = int(state)


def test_a_load_that_fails_half_way_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), Counting(4, 2))
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    state = {key: value + 1 for key, value in lora_state_dict(model).items()}
    before, model[1].fails = copy.deepcopy(lora_state_dict(model)), True
    with pytest.raises(OSError, match="planned failure"):
        load_lora_state_dict(model, state)
    assert all(same_bits(value, before[key]) for key, value in lora_state_dict(model).items())
    model[1].fails = False
    load_lora_state_dict(model, state)
    assert all(same_bits(value, state[key]) for key, value in lora_state_dict(model).items())
    assert model[1].count == 1


def test_who_waits_for_a_load_hears_of_it():
    model, heard = adapted(), []
    for module in (model, model.head):
        module.register_load_state_dict_post_hook(lambda module, incompatible: heard.append(module))
    load_lora_state_dict(model, lora_state_dict(model))
    assert {id(module) for module in heard} == {id(model), id(model.head)}


def test_states_of_metrics_travel():
    torchmetrics = pytest.importorskip("torchmetrics")
    models = []
    for _ in range(2):
        model = adapted()
        model.metric = torchmetrics.MeanMetric()
        model.metric.persistent(True)
        models.append(model)
    one, other = models
    one.metric.update(torch.tensor(3.0))
    load_lora_state_dict(other, lora_state_dict(one))
    assert float(other.metric.mean_value) == 3.0


def test_one_of_several_adapters():
    """Its entries alone, live and merged; loading them leaves all others."""
    model = with_adapters(models.net())
    before = snapshot(model)
    states = {name: lora_state_dict(model, name) for name in THREE}
    for name, state in states.items():
        assert set(state) == {key for key in before if f".lora.{name}." in key} and state
        assert all(same_bits(value, before[key]) for key, value in state.items())
    kept = {key: value.clone() for key, value in lora_state_dict(model).items()}
    assert set(kept) == {key for state in states.values() for key in state}
    fill(model, seed=1)
    changed = snapshot(model)
    load_lora_state_dict(model, kept, name="de")
    for key, value in model.state_dict().items():
        assert same_bits(value, (before if ".lora.de." in key else changed)[key]), key
    merge_lora(model, {"fr": 1.0})
    assert set(lora_state_dict(model, "es")) == set(states["es"])
    with pytest.raises(ValueError, match="`name` must be the name of an adapter, but got 'it'"):
        lora_state_dict(model, "it")


def test_a_state_without_an_entry_of_the_adapter_is_refused():
    model = with_adapters(models.net())
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"`state` lacks `layers\.0\.q\.lora\.fr\.A` of the adapter `fr` \(8 missing\)"
    ):
        load_lora_state_dict(model, lora_state_dict(model, "de"), name="fr")
    assert_same_values(model, before)
