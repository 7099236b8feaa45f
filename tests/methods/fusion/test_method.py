"""Fusion on whole models: the start, what trains, what a state holds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_lora.methods.bottleneck.config import PLACEMENTS, BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from lightning_lora.methods.fusion.config import FusionConfig
from lightning_lora.methods.fusion.method import FusionMethod
from lightning_lora.model.fingerprint import fingerprint
from tests.helpers import models

every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def trained_run(path, seed, placement):
    """A model with trained bottlenecks, and its checkpoint at ``path``."""
    model, config = models.net(), BottleneckConfig(3, placement, name=path.stem)
    method = BottleneckMethod(config)
    method.complete(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in method.added_parameters(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    facts = {"method": "bottleneck", "config": config.to_dict(), "base": fingerprint(model)}
    torch.save({"state_dict": method.state(model), "lightning_lora": facts}, path)
    return model


def runs(folder, placement, count=2):
    return {name: trained_run(folder / f"{name}.ckpt", seed, placement) for seed, name in enumerate("abc"[:count])}


def fused(folder, placement, count=2, **arguments):
    adapted = runs(folder, placement, count)
    method = FusionMethod(FusionConfig([str(folder / f"{name}.ckpt") for name in adapted], **arguments))
    model = models.net()
    method.complete(model)
    return method, model, adapted


@every_placement
def test_one_adapter_starts_as_that_adapter(tmp_path, placement):
    _, model, adapted = fused(tmp_path, placement, count=1)
    assert torch.equal(model(X), adapted["a"](X))


@every_placement
def test_only_the_attention_trains(tmp_path, placement):
    method, model, _ = fused(tmp_path, placement)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"query", "query_bias", "key", "key_bias", "value"}
    before = copy.deepcopy(dict(model.named_buffers()))
    model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not method.is_untrained(model)


def test_bottlenecks_are_those_of_the_runs(tmp_path):
    _, model, adapted = fused(tmp_path, "houlsby")
    for name, other in adapted.items():
        for key in ("down", "up", "up_bias"):
            ours = getattr(model.layers[1].o.fusion.adapters[name], key)
            assert torch.equal(ours, getattr(other.layers[1].o.bottleneck, key))


@every_placement
def test_a_state_holds_all_and_needs_no_file(tmp_path, placement):
    method, model, _ = fused(tmp_path, placement)
    with torch.no_grad():
        for _, parameter in method.added_parameters(model):
            parameter.add_(0.1)
    for file in tmp_path.iterdir():
        file.unlink()
    recorded = pickle.loads(pickle.dumps(method.config.to_dict()))
    other_method, other = FusionMethod(FusionConfig.from_file(recorded)), models.net()
    other_method.complete(other)
    assert not torch.equal(other(X), model(X))
    other_method.load(other, method.state(model))
    assert torch.equal(other(X), model(X))


@every_placement
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(tmp_path, placement, copied):
    _, model, _ = fused(tmp_path, placement)
    other = copied(model)
    assert torch.equal(other(X), model(X))


def test_remove_and_again(tmp_path):
    method, model, _ = fused(tmp_path, "parallel")
    before = model(X)
    assert method.complete(model) == ["layers.0.mlp", "layers.1.mlp"]
    assert torch.equal(model(X), before)
    method.remove(model)
    assert torch.equal(model(X), models.net()(X))
    assert model.state_dict().keys() == models.net().state_dict().keys()
    method.complete(model)  # a second model by the same method reads the files again
    assert torch.equal(model(X), before)


def test_exclude(tmp_path):
    method, _, _ = fused(tmp_path, "pfeiffer", exclude=["layers.0"])
    assert method.complete(models.net()) == ["layers.1.mlp"]


def test_another_base_is_refused_before_anything_changes(tmp_path):
    runs(tmp_path, "pfeiffer", 1)
    model = models.net()
    model.head.bias.data += 1
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"which was trained on another base: `head.bias` has other values"):
        FusionMethod(FusionConfig([str(tmp_path)])).complete(model)
    assert model.state_dict().keys() == keys


def test_values_of_another_shape(tmp_path):
    runs(tmp_path, "pfeiffer", 1)
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["state_dict"]["layers.0.mlp.bottleneck.down"] = torch.ones(2, 16)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"`layers.0.mlp.bottleneck.down` must be finite and of shape \(3, 16\), but"):
        FusionMethod(FusionConfig([str(tmp_path)])).complete(models.net())
