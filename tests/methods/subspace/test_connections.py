"""One z for the whole model, and one row of P for a tied parameter."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.helpers.models import net
from tests.helpers.subspaces import X, every_kind, method, moved, written_out, z_of


def test_a_tied_parameter_is_projected_once():
    model = moved(every_kind(), method())
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "subspace" in name]
    assert names == ["embedding.subspace.z"]


def test_rows_do_not_depend_on_when_a_part_was_adapted():
    whole, parts, by = net(), net(), method()
    by.complete(whole)
    head = parts.head
    del parts.head
    by.complete(parts)
    parts.head = head
    by.complete(parts)
    with torch.no_grad():
        z_of(whole).fill_(1), z_of(parts).fill_(1)
    assert torch.equal(whole(X), parts(X))


def test_a_model_of_which_a_part_was_adapted_on_its_own():
    model, by = net(), method()
    by.complete(model.layers)
    by.complete(model)
    assert len([name for name, _ in by.added_parameters(model)]) == 1
    with torch.no_grad():
        z_of(model).fill_(1)
    assert not torch.equal(model.head.weight, net().head.weight)


def test_a_first_module_that_is_replaced_takes_z_along():
    model, by = net(), method()
    by.complete(model)
    model.layers[0].q = copy.deepcopy(net().layers[0].q)
    by.complete(model)
    with torch.no_grad():
        z_of(model).fill_(1)
    values = written_out(net(), torch.ones(10))
    for name in ("layers.0.q.weight", "head.weight"):
        module, _, key = name.rpartition(".")
        torch.testing.assert_close(getattr(model.get_submodule(module), key), values[name])


def test_a_module_that_is_tied_in_full_has_no_factor_of_its_own():
    torch.manual_seed(0)
    model, by = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)), method(structure=True)
    model[1].weight = model[0].weight
    moved(model, by)
    model(torch.tensor([1, 2])).square().sum().backward()
    assert [name for name, _ in by.trained_parameters(model)] == ["0.subspace.z", "0.subspace.scale"]
    assert all(parameter.grad.any() for _, parameter in by.trained_parameters(model))
