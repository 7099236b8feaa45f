"""Adapters put on a model, switched off and taken away again: what changes, and what must not."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from tests.helpers import oracles
from tests.helpers.oracles import ADAPTERS, BODY, INDEX, adapted, assert_same_values, net, same_bits, snapshot, train


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model):
    return [name for name, flag in flags(model).items() if flag]


def test_the_names_of_the_adapted_modules_come_back_in_the_models_order():
    assert apply_lora(net(), LoRAConfig(targets=["head", "body.2", "embed"])) == ["embed", "body.2", "head"]


def test_adapters_have_the_rank_alpha_and_scale_asked_for():
    arguments = {"rank_pattern": {"body.2": 3}, "alpha_pattern": {"head": 12}, "rslora": True}
    model = adapted(r=4, alpha=8, targets=["body.*", "head"], **arguments)
    made = {name: model.get_submodule(name).lora.default for name in ("body.0", "body.2", "head")}
    assert {name: tuple(adapter.A.shape) for name, adapter in made.items()} == {
        "body.0": (4, 4),
        "body.2": (3, 6),
        "head": (4, 4),
    }
    assert {name: adapter.scale for name, adapter in made.items()} == pytest.approx(
        {"body.0": 8 / 2, "body.2": 8 / 3**0.5, "head": 12 / 2}
    )
    layer, x = model.head, torch.ones(4, dtype=torch.float64)
    product = made["head"].B.detach().double() @ made["head"].A.detach().double()
    expected = (layer.weight.double() + 6 * product) @ x + layer.bias.double()
    oracles.assert_close(layer(x.float()), expected, torch.float32)


TRAINED = [
    ({}, ADAPTERS),
    ({"bias": "lora_only"}, ["body.0.bias", *ADAPTERS[:2], "body.2.bias", *ADAPTERS[2:]]),
    ({"bias": "all"}, ["body.0.bias", *ADAPTERS[:2], "body.1.bias", "body.2.bias", *ADAPTERS[2:], "head.bias"]),
    ({"also_train": ["head"]}, [*ADAPTERS, "head.weight", "head.bias"]),
    ({"also_train": ["head.weight"]}, [*ADAPTERS, "head.weight"]),
    ({"also_train": ["scale"]}, ["scale", *ADAPTERS]),
    (
        {"also_train": ["body.1", "embed"]},
        ["embed.weight", *ADAPTERS[:2], "body.1.weight", "body.1.bias", *ADAPTERS[2:]],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), TRAINED, ids=[str(case[0]) for case in TRAINED])
def test_only_what_was_asked_for_trains_and_every_flag_comes_back(arguments, expected):
    model, before = net(), flags(net())
    config = LoRAConfig(r=2, targets=["body.*"], **arguments)
    apply_lora(model, config)
    assert trained(model) == expected
    frozen = {
        name: value for name, value in snapshot(model).items() if name not in expected and "body.1.running" not in name
    }
    train(model)
    now = model.state_dict()
    assert [name for name in frozen if not same_bits(now[name], frozen[name])] == [
        "steps",
        "body.1.num_batches_tracked",
    ]
    assert not [name for name in expected if not name.endswith(".A") and now[name].abs().sum() == 0]
    merge_lora(model)
    assert flags(model) == before
    unmerge_lora(model)
    assert trained(model) == expected
    remove_lora(model)
    assert flags(model) == before


def test_applying_again_adds_nothing():
    model = train(adapted())
    values, keys, layer = snapshot(model), dict(model.named_parameters()), model.body[0].lora.default
    assert apply_lora(model, BODY) == ["body.0", "body.2"]
    assert model.body[0].lora.default is layer
    assert dict(model.named_parameters()).keys() == keys.keys()
    assert all(parameter is keys[name] for name, parameter in model.named_parameters())
    assert_same_values(model, values)


def test_applying_again_after_a_merge_unmerges_and_goes_on():
    model = train(adapted(r=2, targets=["body.*"], also_train=["head"]))
    values, names = snapshot(model), trained(model)
    merge_lora(model)
    apply_lora(model, LoRAConfig(r=2, targets=["body.*"], also_train=["head"]))
    assert_same_values(model, values)
    assert trained(model) == names


def test_what_moved_before_the_second_time_is_still_taken_back():
    model = adapted(r=2, targets=["body.*"], also_train=["head"])
    base = snapshot(net())
    train(model)
    apply_lora(model, LoRAConfig(r=2, targets=["body.*"], also_train=["head"]))
    remove_lora(model)
    assert_same_values(model, base)
    assert flags(model) == flags(net())


SAME = [
    ({"targets": ("body.*",)}, {}),
    ({"alpha": 2.0}, {}),
    ({"dropout": 0.5}, {}),
    ({"seed": 9}, {}),
    ({"init": "gaussian"}, {}),
    ({"exclude": []}, {}),
]


@pytest.mark.parametrize(("arguments", "first"), SAME, ids=str)
def test_what_makes_no_other_adapter_may_differ(arguments, first):
    model = adapted()
    values = snapshot(model)
    apply_lora(model, LoRAConfig(**({"r": 2, "targets": ["body.*"]} | arguments)))
    assert_same_values(model, values)


def test_dropout_may_be_changed():
    model = adapted()
    apply_lora(model, LoRAConfig(r=2, targets=["body.*"], dropout=0.25))
    assert [model.body[index].lora.default.dropout for index in (0, 2)] == [0.25, 0.25]


# Arguments of the first and the second configuration, and what the error says of them.
OTHER = [
    ({}, {"r": 4}, r"`r=4` instead of `r=2`"),
    ({}, {"alpha": 3.0}, r"`alpha=3\.0` instead of `alpha=None`"),
    ({}, {"rslora": True}, r"`rslora=True` instead of `rslora=False`"),
    ({}, {"targets": ["head"]}, r"`targets=\['head'\]` instead of `targets=\['body\.\*'\]`"),
    ({}, {"targets": "all"}, r"`targets='all'` instead of `targets=\['body\.\*'\]`"),
    ({}, {"exclude": ["body.0"]}, r"`exclude=\['body\.0'\]` instead of `exclude=None`"),
    ({}, {"rank_pattern": {"body.0": 1}}, r"`rank_pattern=\{'body\.0': 1\}` instead of `rank_pattern=None`"),
    ({}, {"alpha_pattern": {"body.0": 1}}, r"`alpha_pattern=\{'body\.0': 1\}` instead of"),
    ({}, {"bias": "all"}, r"`bias='all'` instead of `bias='none'`"),
    ({}, {"also_train": ["head"]}, r"`also_train=\['head'\]` instead of `also_train=None`"),
    ({"rank_pattern": {"body.0": 1}}, {"alpha": 2.0, "rank_pattern": {"body.0": 1}}, r"`alpha=2\.0` instead of"),
    (
        {"rank_pattern": {"body.0": 1, "0": 3}},
        {"rank_pattern": {"0": 3, "body.0": 1}},  # the first key that matches counts
        r"`rank_pattern=.*` instead of",
    ),
]


@pytest.mark.parametrize(("first", "second", "words"), OTHER, ids=[str(case[1]) for case in OTHER])
@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_another_configuration_is_refused_with_the_ways_out(first, second, words, merged):
    common = {"r": 2, "targets": ["body.*"]}
    model = adapted(**(common | first))
    if merged:
        merge_lora(model)
    values, before = snapshot(model), flags(model)
    with pytest.raises(ValueError, match=words) as caught:
        apply_lora(model, LoRAConfig(**(common | second)))
    assert ("(merged)" in str(caught.value)) == merged
    assert "`remove_lora(model)`" in str(caught.value)
    assert "`merge_lora(model, undo=False)`" in str(caught.value)
    assert_same_values(model, values)
    assert flags(model) == before


@pytest.mark.parametrize("way_out", [remove_lora, lambda model: merge_lora(model, undo=False)], ids=["remove", "merge"])
def test_the_ways_out_work(way_out):
    model = train(adapted())
    way_out(model)
    base = snapshot(model)
    assert apply_lora(model, LoRAConfig(r=3, targets=["head"], name="other")) == ["head"]
    assert [name for name, _ in lora_parameters(model)] == ["head.lora.other.A", "head.lora.other.B"]
    remove_lora(model)
    assert_same_values(model, base)


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_remove_leaves_no_trace(merged):
    plain = net()
    model = train(adapted(r=2, targets=["body.*"], bias="all", also_train=["head", "scale"]))
    if merged:
        merge_lora(model)
    assert not same_bits(model.body[1].running_mean, plain.body[1].running_mean)
    remove_lora(model)
    assert_same_values(model, snapshot(plain))
    assert flags(model) == flags(plain)
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(one) is type(other)
        assert {key for key in vars(one) if "lora" in key.lower()} == set()
        assert list(one._modules) == list(other._modules)
        assert {key: len(value) for key, value in vars(one).items() if key.endswith("_hooks")} == {
            key: len(value) for key, value in vars(other).items() if key.endswith("_hooks")
        }
    assert same_bits(model.eval()(INDEX), plain.eval()(INDEX))


def test_remove_does_nothing_to_a_plain_model():
    model = net()
    before = snapshot(model)
    remove_lora(model)
    assert_same_values(model, before)
    assert flags(model) == flags(net())
    assert {key for module in model.modules() for key in vars(module) if "lora" in key.lower()} == set()


def test_a_failed_apply_changes_nothing():
    model = net()
    with pytest.raises(ValueError, match=r"`targets` has 'nowhere', which matches no module"):
        apply_lora(model, LoRAConfig(targets=["body.*", "nowhere"]))
    assert_same_values(model, snapshot(net()))
    assert flags(model) == flags(net())
    assert {key for module in model.modules() for key in vars(module) if "lora" in key.lower()} == set()


def test_gradients_reach_every_adapter_and_nothing_of_the_base():
    model = adapted()
    model(INDEX).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(ADAPTERS)
    assert min(float(parameter.grad.abs().sum()) for _, parameter in lora_parameters(model)) > 0


def test_at_the_first_step_b_moves_and_a_does_not():
    model = net()
    apply_lora(model, BODY)
    model(INDEX).square().sum().backward()
    assert model.body[0].lora.default.A.grad.abs().sum() == 0
    assert model.body[0].lora.default.B.grad.abs().sum() > 0


def test_attributes_of_the_users_own_and_references_from_outside_live_on():
    model = net()
    layer, weight = model.body[0], model.body[0].weight
    layer.note = "mine"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_lora(model, BODY)
    assert (model.body[0] is layer, layer.note, layer.weight is weight) == (True, "mine", True)
    remove_lora(model)
    assert layer.note == "mine"
    assert any(parameter is layer.weight for parameter in optimizer.param_groups[0]["params"])


def test_substrings_of_names_decide_nothing():
    model = nn.Sequential()
    for name in ("exploration", "lora_like", "A", "B"):
        model.add_module(name, nn.Linear(2, 2))
    assert apply_lora(model, LoRAConfig(r=1, targets=["A"])) == ["A"]
    assert trained(model) == ["A.lora.default.A", "A.lora.default.B"]
    remove_lora(model)
    assert len(trained(model)) == 8


@pytest.mark.parametrize("duplicate", [copy.deepcopy, oracles.saved_and_loaded], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_copies_of_a_model_know_all_and_stand_alone(duplicate, merged):
    model = train(adapted(r=2, targets=["body.*"], also_train=["head"]))
    if merged:
        merge_lora(model)
    values, before = snapshot(model), flags(model)
    other = duplicate(model)
    assert_same_values(other, values)
    assert flags(other) == before
    remove_lora(other)
    assert_same_values(other, snapshot(net()))
    assert flags(other) == flags(net())
    assert_same_values(model, values)
    assert flags(model) == before


def test_a_copied_model_trains_apart():
    model = adapted()
    other = copy.deepcopy(model)
    before = snapshot(model)
    train(other)
    assert_same_values(model, before)
    assert not same_bits(other.body[0].lora.default.B, model.body[0].lora.default.B)


@pytest.mark.parametrize("case", oracles.CASES)
def test_disabled_adapters_give_the_bases_output_bit_for_bit(case):
    model, x = oracles.build(case)
    plain = copy.deepcopy(model)
    oracles.adapt(model)
    enabled = model(x)
    with disable_lora(model):
        assert same_bits(model(x), plain(x))
    assert same_bits(model(x), enabled)


def test_disabling_takes_the_bases_biases_heads_and_statistics_too():
    model, plain = train(adapted(r=2, targets=["body.*"], bias="all", also_train=["head", "scale"])), net().eval()
    after, objects = snapshot(model), dict(model.named_parameters())
    model.eval()
    output = model(INDEX)
    with disable_lora(model):
        assert same_bits(model(INDEX), plain(INDEX))
    assert same_bits(model(INDEX), output)
    assert_same_values(model, after)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())


def test_disabling_ends_with_an_exception_and_nests():
    model = adapted().eval()
    output, plain = model(INDEX), net().eval()(INDEX)
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    assert same_bits(model(INDEX), output)
    with disable_lora(model):
        with disable_lora(model):
            assert same_bits(model(INDEX), plain)
        assert same_bits(model(INDEX), plain)
    assert same_bits(model(INDEX), output)


def test_disabling_a_part_leaves_the_rest_on():
    model = adapted(r=2, targets=["body.*"]).eval()
    with disable_lora(model.body[0]):
        off = model(INDEX)
    reference = adapted(r=2, targets=["body.*"]).eval()
    reference.body[0].lora.default.B.data.zero_()
    oracles.assert_close(off, reference(INDEX), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_disabling_works_on_a_model_that_was_cast(dtype):
    config = {"r": 2, "targets": ["body.*"], "bias": "all", "also_train": ["head"]}
    model, plain = adapted(**config).to(dtype).eval(), net().to(dtype).eval()
    with disable_lora(model):
        assert same_bits(model(INDEX), plain(INDEX))


def test_disabling_gives_a_shared_trained_bias_its_trained_value_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    original = model[0].bias.detach().clone()
    apply_lora(model, LoRAConfig(targets="all", bias="all"))
    model[0].bias.data.fill_(3)
    with disable_lora(model):
        assert same_bits(model[0].bias, original)
    assert model[0].bias.tolist() == [3, 3, 3, 3]


def test_what_is_merged_or_plain_cannot_be_disabled():
    model = adapted()
    merge_lora(model)
    words = r"merged into the model: call `unmerge_lora\(model\)` before `disable_lora`"
    with pytest.raises(ValueError, match=words), disable_lora(model):
        pass
    with pytest.raises(ValueError, match=r"no adapters to disable: call `apply_lora` first"), disable_lora(net()):
        pass
