"""What every method that adds modules has from its base class, shown by the smallest one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, remove_lora
from lightning_lora.methods.added_config import AddedConfig
from lightning_lora.methods.lora import LoRAMethod
from tests.helpers.toy_method import ToyConfig, ToyLayer, ToyMethod

METHOD = ToyMethod(ToyConfig(also_train=["1"], seed=3))
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).requires_grad_(True)


def trained() -> nn.Module:
    own = model()
    METHOD.complete(own)
    own(X).sum().backward()
    with torch.no_grad():
        for _, parameter in METHOD.trained_parameters(own):
            parameter += 0.1
    return own


def test_it_starts_as_the_base_and_freezes_it():
    own, base = model(), model()
    assert METHOD.complete(own) == ["0", "2"] == METHOD.complete(own)
    assert all(isinstance(own[at], ToyLayer) for at in (0, 2))
    assert torch.equal(own.eval()(X), base.eval()(X))
    flags = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert flags == dict(METHOD.trained_parameters(own)).keys() == set(METHOD.state(own))
    assert dict(METHOD.added_parameters(own)).keys() == flags - {"1.weight", "1.bias"}
    assert list(lora_parameters(own)) == []


def test_values_follow_from_the_seed_and_the_name_alone():
    first, second = model(), model()
    METHOD.complete(first)
    torch.manual_seed(99)
    METHOD.complete(second)
    assert torch.equal(first[0].toy.down, second[0].toy.down)
    assert not torch.equal(first[0].toy.down, first[2].toy.down[:, :1].expand(3, 4))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(99)))


def test_remove_gives_everything_back():
    own, base = trained(), model()
    assert not METHOD.is_untrained(own)
    METHOD.remove(own)
    assert [type(module) for module in own] == [type(module) for module in base]
    state = own.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert state.keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert METHOD.present(own) is None
    METHOD.remove(own)


def test_a_file_loads_into_a_fresh_model_or_not_at_all():
    own, fresh = trained(), model()
    METHOD.complete(fresh)
    state = METHOD.state(own)
    METHOD.load(fresh, state)
    assert torch.equal(own.eval()(X), fresh.eval()(X))
    before = copy.deepcopy(METHOD.state(fresh))
    with pytest.raises(ValueError, match=r"lacks `2\.toy\.up`"):
        METHOD.load(fresh, {key: value + 1 for key, value in state.items() if key != "2.toy.up"})
    assert all(torch.equal(value, before[key]) for key, value in METHOD.state(fresh).items())


def test_load_state_dict_takes_its_file_and_a_file_of_the_base():
    own, fresh = trained(), model()
    METHOD.complete(fresh)
    fresh.load_state_dict(METHOD.state(own))
    assert torch.equal(own.eval()(X), fresh.eval()(X))
    fresh.load_state_dict(model().state_dict())
    assert torch.equal(fresh[0].toy.up, own[0].toy.up)


def test_a_model_takes_one_method():
    own = model()
    METHOD.complete(own)
    with pytest.raises(ValueError, match=r"adapted by ToyConfig already, and this asks for LoRAConfig.*remove_adapted"):
        apply_lora(own, LoRAConfig(targets="all"))
    with pytest.raises(ValueError, match="ToyConfig already, and this asks for LoRAConfig"):
        LoRAMethod(LoRAConfig(targets="all")).check_same(own)
    remove_lora(own)
    assert METHOD.is_adapted(own)
    with pytest.raises(ValueError, match=r"asks for `size=9` instead of `size=3`"):
        ToyMethod(ToyConfig(also_train=["1"], size=9)).check_same(own)
    ToyMethod(ToyConfig(also_train=["1"], seed=4)).check_same(own)
    lora = model()
    apply_lora(lora, LoRAConfig(targets="all"))
    with pytest.raises(ValueError, match=r"adapted by LoRAConfig already, and this asks for ToyConfig"):
        METHOD.check_same(lora)


def test_a_failure_changes_nothing():
    own = model()

    class Failing(ToyMethod):
        def new(self, name, module, seed):
            if name == "2":
                raise RuntimeError("no memory")
            return super().new(name, module, seed)

    before = dict(vars(own[0]))
    with pytest.raises(RuntimeError, match="no memory"):
        Failing(METHOD.config).complete(own)
    assert vars(own[0]).keys() == before.keys() and type(own[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_copies_that_the_config_does_not_mean_become_plain():
    own = nn.ModuleDict({"net": model()})
    METHOD.complete(own)
    known = list(own.modules())
    own["late"] = copy.deepcopy(own["net"])
    assert METHOD.make_plain(own, known) == ["late"]
    assert not any(isinstance(module, ToyLayer) for module in own["late"])
    assert METHOD.complete(own) == ["net.0", "net.2"]
    with torch.no_grad():
        own["net"][0].toy.up.fill_(1)
    known = list(own.modules())
    own["later"] = copy.deepcopy(own["net"])
    with pytest.raises(ValueError, match="with a trained toy came into the model"):
        METHOD.make_plain(own, known)


def test_adapt_leaves_a_model_that_is_not_built_yet():
    own, method = nn.Sequential(nn.ReLU()), ToyMethod(ToyConfig())
    method.adapt(own)
    assert method.present(own) is None
    with pytest.raises(ValueError, match="no linear layer"):
        method.complete(own)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"exclude": "net"}, TypeError, "`exclude` must be a list of module names, but got 'net'"),
        ({"also_train": ["re:(a+)+"]}, ValueError, "`also_train` has"),
        ({"bias": "some"}, ValueError, "`bias` must be one of"),
        ({"seed": True}, TypeError, "`seed` must be an integer or None, but got True"),
        ({"name": "a.b"}, ValueError, "`name` must be a Python identifier, but got 'a.b'"),
        ({"modules_to_save": ["head"]}, TypeError, r"peft's name. Write also_train=\[...\]"),
    ],
)
def test_the_shared_arguments_are_checked(arguments, error, words):
    with pytest.raises(error, match=words):
        ToyConfig(**arguments)


def test_a_config_is_plain_data():
    config = ToyConfig(exclude=("a",), size=2)
    assert config.to_dict()["exclude"] == ["a"]
    assert ToyConfig.from_file(config.to_dict()) == config

    @dataclass(frozen=True, kw_only=True)
    class Other(AddedConfig):
        pass

    assert METHOD.difference(Other()) == "a Other instead of a ToyConfig"
