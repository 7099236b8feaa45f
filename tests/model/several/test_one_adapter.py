"""One of several adapters is taken off; the others stay as they are."""

import copy
import pickle

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
    remove_lora,
)
from lightning_lora.model.fingerprint import fingerprint
from tests.helpers import oracles
from tests.helpers.models import net
from tests.helpers.oracles import same_bits, train
from tests.helpers.several import THREE, fill, outputs


def model_with(**targets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for name, wanted in targets.items():
        apply_lora(model, LoRAConfig(r=1, targets=wanted, name=name))
    return model


def test_a_layer_that_only_this_adapter_had_is_plain_again():
    model = model_with(fr="all", de=["0"])
    kept = {name: parameter.clone() for name, parameter in lora_parameters(model, name="de")}
    remove_lora(model, name="fr")
    assert type(model[2]) is nn.Linear
    assert {name for name, _ in lora_parameters(model)} == kept.keys() == {"0.lora.de.A", "0.lora.de.B"}
    assert all(torch.equal(kept[name], parameter) for name, parameter in lora_parameters(model))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(kept)


def test_without_its_last_adapter_the_model_is_the_base():
    model, before = model_with(fr="all", de=["0"]), model_with().state_dict()
    remove_lora(model, name="fr")
    remove_lora(model, name="de")
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_name_can_be_given_again():
    model = model_with(fr="all", de="all")
    remove_lora(model, name="de")
    apply_lora(model, LoRAConfig(r=2, targets=["2"], name="de"))
    assert model[2].lora.de.r == 2


def test_what_cannot_be_removed():
    model = model_with(fr="all", de="all")
    with pytest.raises(ValueError, match=r"`name` must be the name of an adapter, but got 'dee'\. The model has `de`"):
        remove_lora(model, name="dee")
    merge_lora(model)
    with pytest.raises(ValueError, match=r"call `unmerge_lora\(model\)` first, to remove `de` alone"):
        remove_lora(model, name="de")


@pytest.mark.parametrize("compute", ["activations", "weights"])
@pytest.mark.parametrize("gone", THREE)
def test_it_is_as_if_the_adapter_had_never_been_there(compute, gone):
    """The other adapters, the classes, what trains and the base."""

    def with_all(names):
        model = net()
        for name in names:
            apply_lora(model, LoRAConfig(**THREE[name], name=name), compute=compute)
        return model

    rest = [name for name in THREE if name != gone]
    model, without, x = with_all(THREE), with_all(rest), torch.linspace(-1, 1, 80).reshape(5, 16)
    fill(model)
    for name in rest:
        load_lora_state_dict(without, lora_state_dict(model, name), name=name)
    remove_lora(model, name=gone)
    assert torch.allclose(outputs(model, x), outputs(without, x), atol=1e-6)
    assert [type(module) for module in model.modules()] == [type(module) for module in without.modules()]
    assert [key for key, p in model.named_parameters() if p.requires_grad] == list(lora_state_dict(without))
    assert fingerprint(model) == fingerprint(net())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    remove_lora(model)
    assert torch.equal(outputs(model, x), outputs(net(), x))
    assert torch.equal(outputs(copied, x), outputs(copy.deepcopy(copied), x))
    assert not torch.allclose(outputs(copied, x), outputs(net(), x), atol=1e-3)


def with_statistics(**configs):
    model = oracles.net()
    for name, arguments in configs.items():
        apply_lora(model, LoRAConfig(r=1, name=name, **arguments))
    return train(model)


def values_of(model, *names):
    return {name: model.get_parameter(name).detach().clone() for name in names}


def test_what_trained_with_it_alone_is_as_before():
    model = with_statistics(
        fr={"targets": ["body.0"], "also_train": ["head"], "bias": "lora_only"},
        de={"targets": ["body.2"], "also_train": ["scale"], "bias": "lora_only"},
    )
    kept = values_of(model, "scale", "body.2.bias")
    assert not same_bits(model.head.weight, oracles.net().head.weight), "it was trained"
    remove_lora(model, name="fr")
    for name, value in values_of(oracles.net(), "head.weight", "head.bias", "body.0.bias").items():
        assert same_bits(model.get_parameter(name), value), name
    assert all(same_bits(model.get_parameter(name), value) for name, value in kept.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name} == kept.keys()
    assert set(lora_state_dict(model)) >= kept.keys()
    assert not {"head.weight", "head.bias", "body.0.bias"} & lora_state_dict(model).keys()


def test_what_another_one_trains_too_stays_trained():
    model = with_statistics(
        fr={"targets": ["body.0"], "also_train": ["head"], "bias": "all"},
        de={"targets": ["body.2"], "also_train": ["head.weight"]},
    )
    trained = values_of(model, "head.weight")["head.weight"]
    remove_lora(model, name="fr")
    assert same_bits(model.head.weight, trained) and model.head.weight.requires_grad
    assert same_bits(model.head.bias, oracles.net().head.bias) and not model.head.bias.requires_grad
    remove_lora(model, name="de")
    assert same_bits(model.head.weight, oracles.net().head.weight)


def test_a_parameter_with_two_names_stays_while_one_of_them_is_asked_for():
    model = oracles.net()
    model.scale_too = nn.Module()
    model.scale_too.register_parameter("weight", model.scale)
    apply_lora(model, LoRAConfig(r=1, targets=["body.0"], name="fr", also_train=["scale"]))
    apply_lora(model, LoRAConfig(r=1, targets=["body.2"], name="de", also_train=["scale_too"]))
    trained = train(model).scale.detach().clone()
    remove_lora(model, name="fr")
    assert same_bits(model.scale, trained) and model.scale.requires_grad


def test_the_initial_value_is_that_of_the_base_which_is_loaded_later():
    model = with_statistics(fr={"targets": ["body.0"], "also_train": ["head"]}, de={"targets": ["body.2"]})
    remove_lora(model, name="fr")
    with torch.no_grad():
        model.head.weight.fill_(2.0)  # as a base that is loaded now
    apply_lora(model, LoRAConfig(r=1, targets=["body.0"], name="fr", also_train=["head"]))
    train(model)
    remove_lora(model)
    assert bool((model.head.weight == 2.0).all())
