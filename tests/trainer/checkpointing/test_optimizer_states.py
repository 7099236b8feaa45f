"""States are matched by the names of parameters; where that cannot be, the file stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lora.trainer.checkpointing.contents import KEY, OPTIMIZER_NAMES
from lightning_lora.trainer.checkpointing.optimizer_states import matched, names_of


def module() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})


def stepped(model: nn.Module, *groups: str) -> torch.optim.Optimizer:
    """An optimizer with these groups, whose first averages tell the parameters apart."""
    optimizer = torch.optim.Adam([{"params": [model[name].weight for name in group]} for group in groups])
    for number, name in enumerate("abc"):
        model[name].weight.grad = torch.full((2, 2), number + 1.0)
    optimizer.step()
    return optimizer


def file_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"optimizer_states": [optimizer.state_dict()], KEY: {OPTIMIZER_NAMES: names_of([optimizer], model)}}


def averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    states = {name: optimizer.state.get(model[name].weight) for name in "abc"}
    return {name: round(float(state["exp_avg"][0, 0]), 3) for name, state in states.items() if state}


def test_states_follow_their_parameters_across_orders_and_groups():
    old, new = module(), module()
    file, optimizer = file_of(old, stepped(old, "ab", "c")), stepped(new, "c", "ba")
    optimizer.load_state_dict(matched(file, [optimizer], new)["optimizer_states"][0])
    assert averages(new, optimizer) == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_a_parameter_that_the_file_does_not_know_has_no_state_and_one_that_is_gone_stays_out():
    old, new = module(), module()
    file, optimizer = file_of(old, stepped(old, "ab")), stepped(new, "cb")
    optimizer.load_state_dict(matched(file, [optimizer], new)["optimizer_states"][0])
    assert averages(new, optimizer) == {"b": 0.2}


def test_a_file_in_the_order_of_the_run_or_of_other_groups_stays_as_it_is():
    old = module()
    optimizer = stepped(old, "ab")
    file = file_of(old, optimizer)
    assert matched(file, [optimizer], old) is file
    assert matched(file, [stepped(old, "a", "b")], old) is file
    assert matched(file, [optimizer, optimizer], old) is file
    assert matched({**file, KEY: {}}, [stepped(old, "ba")], old)["optimizer_states"] is file["optimizer_states"]
