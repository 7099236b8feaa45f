"""What moves though the base is frozen, and how it gets its first values back."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, remove_lora, unmerge_lora
from lightning_lora.model.initial_values import moved, put_back
from lightning_lora.model.journal import Journal
from tests.helpers.oracles import adapted, assert_same_values, net, same_bits, snapshot, train

ALL = {"r": 2, "targets": ["body.*"], "bias": "lora_only", "also_train": ["head"]}


def moved_names(model):
    names = {id(module): name for name, module in model.named_modules()}
    return sorted(f"{names[id(module)]}.{key}".removeprefix(".") for module, key, _ in moved(model))


def test_nothing_has_moved_at_first():
    assert moved_names(adapted(**ALL)) == []
    assert moved_names(net()) == []


def test_training_moves_biases_modules_and_statistics():
    assert moved_names(train(adapted(**ALL))) == [
        "body.0.bias",
        "body.1.num_batches_tracked",
        "body.1.running_mean",
        "body.1.running_var",
        "body.2.bias",
        "head.bias",
        "head.weight",
        "steps",
    ]


def test_the_values_from_before_come_with_it():
    before = snapshot(net())
    model = train(adapted(**ALL))
    names = {id(module): name for name, module in model.named_modules()}
    for module, key, original in moved(model):
        name = f"{names[id(module)]}.{key}".removeprefix(".")
        assert same_bits(original, before[name])


def test_any_bit_counts():
    model = net()
    model.head.bias.data.zero_()
    apply_lora(model, LoRAConfig(**ALL))
    assert moved_names(model) == []
    model.head.bias.data.fill_(-0.0)
    assert moved_names(model) == ["head.bias"]


def test_a_nan_has_not_moved():
    model = net()
    model.body[1].running_mean.fill_(float("nan"))
    apply_lora(model, LoRAConfig(**ALL))
    assert moved_names(model) == []


def test_what_goes_back_to_its_value_has_not_moved():
    model = adapted(**ALL)
    bias = model.head.bias.detach().clone()
    model.head.bias.data.add_(1)
    assert moved_names(model) == ["head.bias"]
    model.head.bias.data.copy_(bias)
    assert moved_names(model) == []


def test_put_back_gives_the_base_its_values_and_leaves_the_adapters():
    model = train(adapted(**ALL))
    objects = dict(model.named_parameters())
    adapters = {name: value for name, value in snapshot(model).items() if ".lora." in name}
    put_back(model, Journal(model))
    expected = snapshot(net()) | adapters
    now = model.state_dict()
    assert now.keys() == expected.keys()
    assert [name for name in now if not same_bits(now[name], expected[name])] == []
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_alone_moves_nothing(dtype):
    assert moved_names(adapted(**ALL).to(dtype)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_model_gets_the_cast_base_back(dtype):
    model = train(adapted(**ALL)).to(dtype)
    remove_lora(model)
    assert_same_values(model, snapshot(net().to(dtype)))


def test_copies_are_private():
    model = adapted(**ALL)
    base = snapshot(net())
    for tensor in (model.head.weight.data, model.body[1].running_mean):
        tensor.add_(5)
    remove_lora(model)
    assert_same_values(model, base)


def test_what_moved_lives_through_a_merge():
    model = train(adapted(**ALL))
    names, values = moved_names(model), snapshot(model)
    merge_lora(model)
    assert moved_names(model) == names
    unmerge_lora(model)
    assert moved_names(model) == names
    assert_same_values(model, values)


def test_a_merge_that_is_not_to_be_undone_keeps_what_was_trained():
    model = train(adapted(**ALL))
    head, mean = model.head.weight.detach().clone(), model.body[1].running_mean.clone()
    merge_lora(model, undo=False)
    assert moved_names(model) == []
    remove_lora(model)
    assert same_bits(model.head.weight, head)
    assert same_bits(model.body[1].running_mean, mean)


def test_a_buffer_that_was_without_values_is_not_remembered():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, device="meta"))
    apply_lora(model, LoRAConfig(targets=["0"]))
    model[1].to_empty(device="cpu").reset_parameters()
    model(torch.randn(3, 4))
    assert moved_names(model) == []


def test_a_buffer_that_is_gone_is_left_alone():
    model = adapted(**ALL)
    model.steps += 1
    del model.steps
    assert moved_names(model) == []
    remove_lora(model)
    assert "steps" not in model.state_dict()
