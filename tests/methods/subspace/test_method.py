"""The method on models of all kinds, against plain models whose parameters hold the sums."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_lora.layers.adapter import seed_of
from lightning_lora.methods.subspace.projections import PROJECTIONS, dense_matrix
from tests.helpers.models import net
from tests.helpers.subspaces import MODELS, X, method, moved, outputs, written_out, z_of


@pytest.mark.parametrize("name", MODELS)
def test_it_starts_as_the_base_bit_for_bit_and_computes_with_the_sums(name):
    make, x = MODELS[name]
    torch.manual_seed(0)
    base, by = make().eval(), method()
    model, expected = copy.deepcopy(base), copy.deepcopy(base)
    by.complete(model)
    assert all(map(torch.equal, outputs(model, x), outputs(base, x)))
    frozen = {key: value.clone() for key, value in model.named_parameters() if "subspace" not in key}
    moved(model, by)
    values = written_out(expected, z_of(model))
    with torch.no_grad():
        for key, parameter in expected.named_parameters():
            parameter.copy_(values[key])
    torch.testing.assert_close(outputs(model, x), outputs(expected, x))
    assert not torch.equal(outputs(model, x)[0], outputs(base, x)[0])
    assert all(torch.equal(value, frozen[key]) for key, value in model.named_parameters() if key in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(PROJECTIONS))
def test_the_gradient_of_z_is_that_of_full_fine_tuning_projected(kind):
    base, model = net(), net()
    moved(model, method(projection=kind))
    values = {name: v.requires_grad_() for name, v in written_out(base, z_of(model).detach(), kind).items()}
    functional_call(base, values, X).square().sum().backward()
    model(X).square().sum().backward()
    rows = sum(value.numel() for value in values.values())
    expected = torch.zeros(10)
    for name, value in values.items():
        columns = [PROJECTIONS[kind].rows(unit, seed_of(3, name, "subspace"), value.numel()) for unit in torch.eye(10)]
        P = torch.stack(columns, 1)
        if kind == "dense":
            torch.testing.assert_close(
                P, dense_matrix(seed_of(3, name, "subspace"), value.numel(), 10, torch.device("cpu"))
            )
        expected += P.T @ value.grad.flatten() / rows**0.5
    torch.testing.assert_close(z_of(model).grad, expected)


def test_columns_of_the_whole_matrix_have_unit_norm():
    base = net()
    zero = written_out(base, torch.zeros(10))
    columns = [
        torch.cat([(v - zero[name]).flatten() for name, v in written_out(base, unit).items()]) for unit in torch.eye(10)
    ]
    gram = torch.stack(columns) @ torch.stack(columns).T
    torch.testing.assert_close(gram, torch.eye(10), atol=0.15, rtol=0)


def test_structure_gives_each_module_a_factor():
    base, model = net(), net()
    by = method(structure=True)
    by.complete(model)
    assert torch.equal(model(X), base(X))
    names = [name for name, _ in by.added_parameters(model)]
    modules = {name.rpartition(".")[0] for name, _ in base.named_parameters()}
    assert set(names) == {"layers.0.q.subspace.z"} | {f"{name}.subspace.scale" for name in modules}
    with torch.no_grad():
        z_of(model).fill_(1)
        model.head.subspace.scale.fill_(-2)
    values = written_out(base, torch.ones(10))
    torch.testing.assert_close(model.head.weight, 3 * base.head.weight - 2 * values["head.weight"])
    torch.testing.assert_close(model.layers[0].q.weight, values["layers.0.q.weight"])
    model(X).sum().backward()
    assert all(parameter.grad is not None for _, parameter in by.trained_parameters(model))


def test_a_file_holds_z_alone_and_loads_into_a_fresh_model():
    model, fresh, by = moved(net(), method()), net(), method()
    by.complete(fresh)
    state = by.state(model)
    assert list(state) == ["layers.0.q.subspace.z"]
    by.load(fresh, state)
    assert torch.equal(fresh(X), model(X))


def test_what_is_said_of_it():
    model = net()
    by = method(also_train=["head"])
    by.complete(model)
    assert by.describe(model).splitlines() == [
        "2,784 parameters of 12 modules move in a subspace of 10 dimensions: z trains, `layers.0.q.subspace.z`",
        "and trains in full: head.weight (48), head.bias (3)",
        "61 trainable parameters, 2.15% of the base's 2,835; 244 B in a checkpoint",
    ]


def test_another_configuration_is_another_model():
    model = net()
    method().complete(model)
    for change in ({"seed": 4}, {"dimension": 11}, {"structure": True}, {"projection": "dense"}, {"targets": ["head"]}):
        with pytest.raises(ValueError, match=rf"`{next(iter(change))}="):
            method(**change).check_same(model)


@pytest.mark.slow
def test_accuracy_grows_with_the_dimension():
    """Li et al. 2018: below the intrinsic dimension the task cannot be solved, above it can."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=generator)
    labels = (x @ torch.randn(16, 3, generator=generator)).argmax(1)
    accuracy = []
    for dimension in (1, 8, 64):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, by = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)), method(dimension=dimension)
        by.complete(model)
        optimizer = torch.optim.Adam([parameter for _, parameter in by.trained_parameters(model)], lr=0.3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        accuracy.append((model(x).argmax(1) == labels).float().mean().item())
    assert accuracy[0] + 0.1 < accuracy[1] < accuracy[2] - 0.1, accuracy
