"""The merge into the weights, and its exact reverse."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.models import net
from tests.helpers.subspaces import MODELS, method, moved, outputs


@pytest.mark.slow
@pytest.mark.parametrize("structure", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_merge_gives_the_plain_module_and_an_unmerge_the_base(name, structure):
    make, x = MODELS[name]
    torch.manual_seed(0)
    base, by = make().eval(), method(structure=structure)
    model = moved(copy.deepcopy(base), by)
    state = {key: value.clone() for key, value in by.state(model).items()}
    live, values = outputs(model, x), dict(by.merged_values(model))
    lost = by.merge(model)
    assert max(lost.values()) < 1e-4 and by.is_merged(model) and not by.is_adapted(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, outputs(model, x), live))
    merged = by.state(model)
    assert all(torch.equal(value, merged[key]) for key, value in state.items())
    flags = [parameter.requires_grad for parameter in base.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    by.unmerge(model)
    assert all(map(torch.equal, outputs(model, x), live))
    by.remove(model)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, outputs(model, x), outputs(base, x)))


def test_a_merged_weight_that_was_changed_is_not_unmerged():
    model, by = moved(net(), method()), method()
    by.merge(model)
    with torch.no_grad():
        model.head.bias += 1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`head\.bias` is not what the merge left there"):
        by.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_remove_takes_a_merge_out():
    model, by = moved(net(), method()), method()
    by.merge(model)
    by.remove(model)
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in model.state_dict().items())
    assert by.present(model) is None and not by.is_merged(model)
