"""A module with adapters, live or merged, takes an adapter state dict by its own ``load_state_dict``."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_from_checkpoint,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.model.adapter_loading import mark_merged
from tests.helpers.models import Lit, Net, checkpoints, data, net, trainer
from tests.helpers.selection import slow_except

State = dict[str, Any]
CONFIG = LoRAConfig(r=2, alpha=6, also_train=["head"], bias="lora_only")


def trained(seed: int, merged: bool = False) -> tuple[Net, State]:
    """A network with adapters that were trained, and the copy of their state dict."""
    model = net(batch_norm=True)
    apply_lora(model, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.bn.running_mean.fill_(seed)
    state = {key: value.clone() for key, value in lora_state_dict(model).items()}
    if merged:
        merge_lora(model)
    return model, state


def written_out(state: State) -> State:
    """The merged network, ``W0 + 3 * B @ A``, from the base and the tensors of an adapter state dict."""
    plain = net(batch_norm=True).state_dict()
    for key, value in state.items():
        if key in plain:
            plain[key] = value
        elif key.endswith(".A"):
            layer = key.removesuffix(".lora.default.A")
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + 3 * state[f"{layer}.lora.default.B"] @ value
    return plain


def bits(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def assert_merged(model: nn.Module, state: State) -> None:
    expected = written_out(state)
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("merge", slow_except(["best"], [True, "best", False]))
def test_the_best_file_of_a_run_loads_into_the_fitted_module_and_into_its_network(tmp_path, merge):
    module, saved = Lit(batch_norm=True), checkpoints(tmp_path)
    trainer(saved, LoRACallback(r=2, also_train=["head"], merge=merge), max_epochs=3).fit(module, data(), data(1))
    first = next(tmp_path.glob("epoch=0.ckpt"))
    for path in (first, saved.best_model_path, first):
        expected = bits(load_from_checkpoint(Lit, path, merge=merge is not False))
        state = torch.load(path)["state_dict"]
        changed = any(not torch.equal(value, module.state_dict()[key]) for key, value in expected.items())
        assert changed or path == saved.best_model_path
        before = {name: id(parameter) for name, parameter in module.named_parameters()}
        if path == first:
            result = module.load_state_dict(state)
        else:
            result = module.net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
        assert result.missing_keys == result.unexpected_keys == []
        assert_same(bits(module), expected)
        assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    assert_same(lora_state_dict(module), torch.load(first)["state_dict"])
    trainer(LoRACallback(r=2, also_train=["head"], merge=merge)).test(module, data(1), ckpt_path=saved.best_model_path)
    best = bits(load_from_checkpoint(Lit, saved.best_model_path))
    assert_same(bits(module), expected if merge else best)  # live adapters are those that were loaded last


@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_model_is_merged_again_with_what_the_file_holds(assign):
    model, _ = trained(1, merged=True)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _, state = trained(2)
    model.load_state_dict(state, assign=assign)
    assert_merged(model, state)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == [type(module) for module in net(batch_norm=True).modules()]
    unmerge_lora(model)
    assert_same(lora_state_dict(model), state)
    remove_lora(model)
    assert_same(model.state_dict(), net(batch_norm=True).state_dict())


def test_a_model_with_live_adapters_keeps_them_live_and_its_base():
    model, _ = trained(1)
    expected, state = trained(2)
    assert not model.load_state_dict(state).missing_keys
    assert_same(model.state_dict(), expected.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    model.load_state_dict(state)
    merge_lora(model)
    assert_merged(model, state)


def test_what_is_merged_in_part_stays_so():
    model, _ = trained(1)
    merge_lora(model.layers[0])
    expected, state = trained(2)
    merge_lora(expected.layers[0])
    model.load_state_dict(state)
    assert_same(model.state_dict(), expected.state_dict())
    assert not model.layers[1].mlp.weight.requires_grad


WRONG = {
    "lacks": (lambda state: state.pop("layers.1.o.lora.default.B"), r"it lacks `layers\.1\.o\.lora\.default\.B`"),
    "shape": (
        lambda state: state.update({"layers.1.o.lora.default.B": torch.ones(16, 3)}),
        r"`layers\.1\.o\.lora\.default\.B` has shape \(16, 3\)",
    ),
    "other targets": (
        lambda state: state.update({"layers.1.mlp.lora.default.A": torch.ones(2, 16)}),
        r"has `layers\.1\.mlp\.lora\.default\.A`, which this model has not",
    ),
    "no tensor": (lambda state: state.update({"head.weight": 1}), r"`head\.weight` is a int"),
    "other name": (
        lambda state: state.update({key.replace("default", "b"): state.pop(key) for key in list(state)}),
        r"it lacks `layers\.0\.q\.lora\.default\.A`",
    ),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_file_changes_nothing(merged, wrong, strict):
    model, own = trained(1, merged)
    before, (_, state), (change, message) = bits(model), trained(2), WRONG[wrong]
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state, strict=strict)
    assert_same(bits(model), before)
    assert_same(lora_state_dict(model), own)


@pytest.mark.parametrize("copied", [lambda state: state, dict])
def test_the_state_dict_of_live_adapters_loads_where_they_are_merged(copied):
    """As libraries write it that call `module.state_dict()` in the middle of a run."""
    model, _ = trained(1, merged=True)
    live, state = trained(2)
    model.load_state_dict(copied(live.state_dict()))
    assert_merged(model, state)
    unmerge_lora(model)
    assert_same(model.state_dict(), live.state_dict())


@pytest.mark.parametrize("name", ["layers.0.q.weight", "layers.0.mlp.bias"])
def test_live_adapters_on_another_base_are_refused_where_others_are_merged(name):
    model, own = trained(1, merged=True)
    before, state = bits(model), trained(2)[0].state_dict()
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=rf"`{name}` has other values in the state dict than in this module"):
        model.load_state_dict(state)
    assert_same(bits(model), before)
    assert_same(lora_state_dict(model), own)


@pytest.mark.slow
def test_a_key_that_the_module_has_not_stays_unexpected():
    model, _ = trained(1, merged=True)
    merged = merged_state_dict(trained(2)[0])
    mark_merged(merged, trained(2)[1])
    merged["other"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        model.load_state_dict(merged)
    del merged["other"], merged["head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"head.bias"'):
        net(batch_norm=True).load_state_dict(merged)


def test_an_error_in_the_middle_leaves_the_merged_model_as_it_was(monkeypatch):
    model, own = trained(1, merged=True)
    before, (_, state) = bits(model), trained(2)

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.layers[1].v, "_load_from_state_dict", broken)
    with pytest.raises(KeyboardInterrupt):
        model.load_state_dict(state)
    assert_same(bits(model), before)
    assert_same(lora_state_dict(model), own)


def test_plain_weights_load_into_a_merged_model_as_ever_and_are_no_merge():
    model, state = trained(1, merged=True)
    other = {key: value + 1 for key, value in net(batch_norm=True).state_dict().items()}
    model.load_state_dict(other)
    assert_same(bits(model), other)
    with pytest.raises(ValueError, match="is not what the merge left there"):
        model.load_state_dict(state)
    assert_same(bits(model), other)
    model.load_state_dict(net(batch_norm=True).state_dict())  # the base itself, over the merge
    model.load_state_dict(state)
    assert_merged(model, state)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_around_it_loads_the_same(merged):
    model, _ = trained(1, merged)
    _, state = trained(2)
    around = nn.ModuleDict({"plain": nn.Linear(2, 2), "inner": model})
    plain = {f"plain.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()}
    around.load_state_dict({f"inner.{key}": value for key, value in state.items()} | plain)
    assert torch.equal(around["plain"].weight, plain["plain.weight"])
    assert_same(lora_state_dict(model), state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"plain\.weight"'):
        around.load_state_dict({f"inner.{key}": value for key, value in state.items()})


@pytest.mark.slow
def test_a_compiled_network_inside_loads_the_same():
    module, (_, state) = nn.Module(), trained(2)
    module.net = torch.compile(net(batch_norm=True))
    apply_lora(module, CONFIG)
    merge_lora(module)
    module.net.load_state_dict(state)
    assert_merged(module.net._orig_mod, state)
    module.load_state_dict({f"net.{key}": value for key, value in trained(3)[1].items()})
    assert_merged(module.net._orig_mod, trained(3)[1])


@pytest.mark.parametrize("lost", ["layers.0.q.weight", "layers.0.q.bias"])
def test_below_the_whole_model_nothing_that_lacks_is_filled_in(lost):
    model = net()
    apply_lora(model, LoRAConfig(r=2))
    state = bits(model)
    del state[lost], state["layers.0.q.bias" if lost.endswith("weight") else "layers.0.q.weight"]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{lost}"'):
        model.load_state_dict(state)


def by_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_do_the_same_and_the_original_stays(copied, merged):
    model, own = trained(1, merged)
    _, state = trained(2)
    before, copy_of_it = bits(model), copied(model)
    copy_of_it.load_state_dict(state)
    assert_same(lora_state_dict(copy_of_it), state)
    assert_same(bits(model), before)
    assert_same(lora_state_dict(model), own)
    remove_lora(copy_of_it)
    assert hooks(copy_of_it) == 0


def hooks(model: nn.Module) -> int:
    return sum(len(module._load_state_dict_pre_hooks) for module in model.modules())


def merged_for_good(model: nn.Module) -> None:
    merge_lora(model, undo=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("end", [remove_lora, merged_for_good])
def test_the_hook_goes_with_the_record(end, merged):
    model, state = trained(1, merged)
    seen: list[Tensor] = []
    model.register_load_state_dict_pre_hook(lambda *args: seen.append(args[1]))
    before = hooks(model)
    assert before == 1 + 12  # the network, its layers, two blocks and the four projections of each
    apply_lora(model, CONFIG)
    assert hooks(model) == before
    end(model)
    assert hooks(model) == 1
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.q\.lora\.default\.A"):
        model.load_state_dict(state)
    assert len(seen) == 1


def test_a_layer_that_is_the_whole_model():
    layer = nn.Linear(3, 2, bias=False)
    base = layer.weight.detach().clone()
    apply_lora(layer, LoRAConfig(r=1, targets="all"))
    merge_lora(layer)
    state = {"lora.default.A": torch.ones(1, 3), "lora.default.B": torch.ones(2, 1)}
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight, base + 1)
    unmerge_lora(layer)
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_state_dict_that_lost_its_mark_is_not_added_twice_however_small_the_update(dtype):
    model = net(batch_norm=True).to(dtype)
    apply_lora(model, CONFIG)
    with torch.no_grad():
        for layer in (model.layers[0].q, model.layers[1].o):
            layer.lora.default.B.fill_(1e-3)
    before, merged = bits(model), merged_state_dict(model)
    assert not torch.equal(merged["layers.0.q.weight"], before["layers.0.q.weight"])
    model.load_state_dict(dict(merged))
    assert_same(bits(model), before)
    other = net(batch_norm=True).to(dtype).state_dict()
    other = {key: value + 1 if value.is_floating_point() else value for key, value in other.items()}
    model.load_state_dict(other)
    assert torch.equal(model.layers[0].q.weight, other["layers.0.q.weight"])
