"""Reads of the sums under all that torch does to a forward pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora.layers.adapter import seed_of
from lightning_lora.methods.subspace.projections import PROJECTIONS
from tests.helpers.models import FusedBlocks, Tower, net
from tests.helpers.subspaces import MODELS, X, every_kind, method, moved, outputs, z_of


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", [Tower, FusedBlocks])
def test_activation_checkpointing(kind, use_reentrant):
    torch.manual_seed(0)
    model = moved(kind(), method(), 0.5)
    x = torch.randn(2, 3, 4, requires_grad=True)
    gradients = []
    for mode in (None, use_reentrant):
        z_of(model).grad = None
        model(x, use_reentrant=mode).square().sum().backward()
        gradients.append(z_of(model).grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_a_compiled_model():
    model = moved(net(), method(structure=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(X)
        output.square().sum().backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


def test_z_stays_fp32_in_a_bf16_model():
    by = method()
    base, model = net().bfloat16(), moved(net(), by).bfloat16()
    z = z_of(model)
    assert z.dtype == torch.float32
    weight = model.head.weight
    assert weight.dtype == torch.bfloat16
    delta = PROJECTIONS["fastfood"].rows(z.detach(), seed_of(3, "head.weight", "subspace"), 48).view(3, 16)
    rows = sum(parameter.numel() for parameter in base.parameters())
    expected = (base.head.weight.float() + delta / rows**0.5).bfloat16()
    assert torch.allclose(weight.float(), expected.float(), atol=0, rtol=1e-2)
    model(X.bfloat16()).float().sum().backward()
    assert z.grad.dtype == torch.float32 and z.grad.any()
    live = model(X.bfloat16())
    assert by.merge(model)["head"] > 1e-3
    assert torch.equal(model(X.bfloat16()), live)


def test_reads_in_inference_mode_and_under_autocast():
    model, by = moved(net(), method()), method()
    expected = model(X).detach()
    with torch.inference_mode():
        assert torch.equal(model(X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(X)
        by.merge(model)
        assert torch.equal(model(X), live)


@pytest.mark.slow
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(clone, merged):
    model, by = moved(every_kind(), method(structure=True)), method(structure=True)
    x = MODELS["every kind"][1]
    if merged:
        by.merge(model)
    same = clone(model)
    assert all(map(torch.equal, outputs(same, x), outputs(model, x)))
    before = outputs(model, x)
    if merged:
        by.unmerge(same)
    with torch.no_grad():
        z_of(same).zero_()
    assert not torch.equal(outputs(same, x)[0], before[0])
    assert all(map(torch.equal, outputs(model, x), before))


@pytest.mark.parametrize("part", ["", "embedding", "head", "fc"])
def test_a_copy_that_is_made_plain_keeps_what_was_trained(part):
    """Also of a part that does not hold z, and of two that share a parameter."""
    by, model = method(structure=True), moved(every_kind(), method(structure=True))
    original = model.get_submodule(part)
    host = nn.ModuleDict({"model": model})
    known = list(host.modules())
    host["late"] = copy.deepcopy(original)
    by.make_plain(host, known)
    assert not any("subspace" in name for name, _ in host["late"].named_modules())
    for name, late in host["late"].named_modules():
        for key, parameter in late._parameters.items():
            if parameter is not None:
                assert torch.equal(parameter, getattr(original.get_submodule(name), key)), (name, key)
