"""LoRA as a method of a run: the answers are those of the public verbs, and no file above names a verb."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, lora_state_dict, merge_lora
from lightning_lora.methods.base import Method
from lightning_lora.methods.lora import LoRAMethod

CONFIG = LoRAConfig(r=2, targets=["0", "2"], bias="lora_only", seed=3)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def facts(module: nn.Module) -> list[tuple[str, bool, torch.Tensor]]:
    return [(name, p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()]


def same(before, after) -> bool:
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


def train_B(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in lora_parameters(module):
            if name.endswith(".B"):
                parameter.fill_(0.1)


def test_complete_does_what_apply_lora_does():
    method, own, expected = LoRAMethod(CONFIG), model(), model()
    assert method.present(own) is None
    assert method.complete(own) == apply_lora(expected, CONFIG) == ["0", "2"]
    assert same(facts(own), facts(expected))
    assert method.is_adapted(own)
    assert method.present(own) == CONFIG
    before = facts(own)
    method.adapt(own)
    assert method.complete(own) == ["0", "2"]
    assert same(facts(own), before)


def test_adapt_takes_what_exists_and_complete_asks_for_the_rest():
    method, own = LoRAMethod(CONFIG), nn.Sequential(nn.Linear(4, 4))
    method.adapt(own)
    assert [name for name, _ in method.added_parameters(own)] == ["0.lora.default.A", "0.lora.default.B"]
    with pytest.raises(ValueError, match="`targets` has '2', which matches no module"):
        method.complete(own)


def test_what_trains():
    method, own = LoRAMethod(CONFIG), model()
    method.complete(own)
    trained = dict(method.trained_parameters(own))
    assert trained.keys() == {f"{n}.{k}" for n in "02" for k in ("bias", "lora.default.A", "lora.default.B")}
    assert {name for name, flag, _ in facts(own) if flag} == trained.keys()
    assert trained.keys() - dict(method.added_parameters(own)).keys() == {"0.bias", "2.bias"}
    weights = method.adapted_weights(own)
    assert {name: weights[id(p)][0] for name, p in method.added_parameters(own)} == {
        f"{n}.lora.default.{k}": f"{n}.weight" for n in "02" for k in "AB"
    }
    assert all(weight is own.get_parameter(name) for name, weight in weights.values())


def test_as_found_shows_the_model_of_the_user():
    method, own, x = LoRAMethod(CONFIG), model().eval(), torch.randn(3, 4)
    own[1].weight.requires_grad_(False)
    expected, found = own(x), {name: flag for name, flag, _ in facts(own)}
    method.complete(own)
    train_B(own)
    frozen = {name: flag for name, flag, _ in facts(own)}
    with method.as_found(own):
        assert torch.equal(own(x), expected)
        assert {name: flag for name, flag, _ in facts(own) if "lora" not in name} == found
    assert not torch.equal(own(x), expected)
    assert {name: flag for name, flag, _ in facts(own)} == frozen


def test_a_state_goes_into_another_model():
    method, own, other = LoRAMethod(CONFIG), model(), model()
    for each in (own, other):
        method.complete(each)
    assert method.is_untrained(own)
    train_B(own)
    assert not method.is_untrained(own)
    state = method.state(own)
    assert state.keys() == lora_state_dict(own).keys() == set(method.needed_names(own))
    assert method.base_names(own) >= method.frozen_names(own) == {"0.weight", "2.weight", "1.weight", "1.bias"}
    method.load(other, state)
    assert same(facts(own), facts(other))
    with pytest.raises(ValueError, match=r"lacks `0\.bias`"):
        method.load(other, {key: value for key, value in state.items() if key != "0.bias"})


def test_watched_modules_run_and_learn():
    method, own = LoRAMethod(CONFIG), model()
    method.complete(own)
    watched = method.watched(own)
    assert {name: each.weight for name, each in watched.items()} == {"0": "0.weight", "2": "2.weight"}
    own(torch.randn(3, 4)).sum().backward()
    for name, each in watched.items():
        assert each.module is own.get_submodule(f"{name}.lora.default")
        assert each.parameter.grad is not None
        assert any(hasattr(each.module, call) for call in each.calls)


def test_on_a_device_that_fails_a_merge_and_an_unmerge_have_the_same_bits():
    """On the meta device every sum fails; a GPU has its tests in tests/model/test_merge.py."""
    method, own, expected = LoRAMethod(CONFIG), model(), model()
    for each in (own, expected):
        apply_lora(each, CONFIG)
        train_B(each)
    before = facts(own)
    assert method.merge(own, torch.device("meta")) == merge_lora(expected)
    assert same(facts(own), facts(expected))
    method.unmerge(own, torch.device("meta"))
    assert same(facts(own), before)


def test_merge_unmerge_drop_and_remove():
    method, own, expected = LoRAMethod(CONFIG), model(), model()
    before = facts(own)
    for each in (own, expected):
        apply_lora(each, CONFIG)
        train_B(each)
    assert method.never_merges(own) is None
    assert method.cannot_write(own) is None
    values = {name: value.clone() for name, value in method.merged_values(own)}
    assert method.merge(own) == merge_lora(expected)
    assert same(facts(own), facts(expected))
    assert all(torch.equal(value, values[name]) for name, value in own.state_dict().items())
    assert method.is_merged(own)
    method.unmerge(own)
    assert method.is_adapted(own)
    with torch.no_grad():
        own[0].bias.fill_(9)
    method.drop(own)
    assert bool((own[0].bias == 9).all())
    method.complete(own)
    method.remove(own)
    assert [name for name, _, _ in facts(own)] == [name for name, _, _ in before]
    method.complete(expected := model())
    with torch.no_grad():
        expected[0].bias.fill_(9)
    method.remove(expected)
    assert same(facts(expected), before)


def test_configurations_are_compared():
    method = LoRAMethod(CONFIG)
    assert method.difference(LoRAConfig(r=4, targets=["0", "2"], bias="lora_only")) == "`r=4` instead of `r=2`"
    assert method.difference(CONFIG) is None
    own = model()
    method.complete(own)
    with pytest.raises(ValueError, match="already has adapters, and this asks for `r=8`"):
        LoRAMethod(LoRAConfig(r=8, targets=["0", "2"], bias="lora_only")).check_same(own)


def test_describe_names_what_is_adapted():
    method, own = LoRAMethod(CONFIG), model()
    method.complete(own)
    assert "4 -> 4" in method.describe(own)


def test_a_method_that_does_not_merge_says_so():
    class Other(LoRAMethod):
        key = "prompt"
        is_merged, merge, unmerge = Method.is_merged, Method.merge, Method.unmerge
        never_merges, cannot_write, merged_values = Method.never_merges, Method.cannot_write, Method.merged_values

    other, own = Other(CONFIG), model()
    assert not other.is_merged(own)
    assert other.never_merges(own) == "The method has no update of the weights."
    assert other.cannot_write(own) is None
    for verb in (other.merge, other.unmerge, other.merged_values):
        with pytest.raises(ValueError, match=r"`prompt` (cannot be|is never) merged into the weights"):
            verb(own)
