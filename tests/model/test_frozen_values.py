"""Every change of a frozen parameter is seen: by its mark, or by its checksum where the mark cannot tell."""

import pytest
import torch
from torch import nn

from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.frozen_values import FrozenValues


def model(dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.Embedding(40, 30), nn.Conv2d(3, 8, 3)).to(dtype)
    made[2].to(memory_format=torch.channels_last)
    made.register_parameter("turned", nn.Parameter(torch.randn(20, 30, dtype=dtype).t()))
    made.register_parameter("empty", nn.Parameter(torch.empty(0, 3, dtype=dtype)))
    made.register_parameter("scalar", nn.Parameter(torch.ones((), dtype=dtype)))
    return made.requires_grad_(False)


CHANGES = {
    "in place": lambda p: p.add_(1e-3),
    "one value": lambda p: p.view(-1)[-3:].mul_(2) if p.is_contiguous() else p[0].mul_(2),
    "data": lambda p: setattr(p, "data", p.data * 2),
    "in place on data": lambda p: p.data.mul_(2),
}
NAMES = ["0.weight", "0.bias", "1.weight", "2.weight", "turned", "scalar"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "turned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_change_is_seen_by_the_mark(change, name, dtype):
    made = model(dtype)
    base, values = fingerprint(made), FrozenValues(dict(made.named_parameters()))
    assert values.changed(base) == values.changed_exactly(base) == []
    CHANGES[change](made.get_parameter(name))
    assert values.changed(base) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_one_value_that_is_written_past_autograd_is_seen_by_the_checksum(name):
    made = model()
    base, values = fingerprint(made), FrozenValues(dict(made.named_parameters()))
    data = made.get_parameter(name).data
    data[tuple(size - 1 for size in data.shape)] = 7.0  # the last value
    assert values.changed_exactly(base) == [name]


def test_equal_values_written_again_are_no_change():
    made = model()
    base, values = fingerprint(made), FrozenValues(dict(made.named_parameters()))
    made.load_state_dict({name: value.clone() for name, value in made.state_dict().items()})
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    assert values.changed(base) == values.changed_exactly(base) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_after_the_fingerprint_is_no_change(dtype):
    made = model()
    base = fingerprint(made)
    made.to(dtype)
    values = FrozenValues(dict(made.named_parameters()))
    assert values.changed_exactly(base) == []
    made[0].weight.data[0, 1] = 9
    assert values.changed_exactly(base) == ["0.weight"]


def test_what_fsdp1_holds_is_compared_by_a_few_values_of_this_rank_s_part():
    flat = torch.randn(64)
    parts = {
        "whole": nn.Parameter(torch.randn(8)),
        "part": nn.Parameter(flat[:40]),
        "elsewhere": nn.Parameter(flat[:0]),
    }
    for name in ("part", "elsewhere"):
        parts[name]._fsdp_flattened = True
    base = {name: [None, None, None, 8, 8] for name in ("part", "elsewhere")}
    values = FrozenValues(parts)
    assert values.changed(base) == values.changed_exactly(base) == []
    parts["part"].data = flat[:40]  # as after each step
    assert values.changed_exactly(base) == []
    flat.mul_(2)
    assert values.changed(base) == values.changed_exactly(base) == ["part"]


def test_what_fsdp1_has_gathered_for_now_is_no_change():
    part = nn.Parameter(torch.randn(8))
    part._fsdp_flattened = True
    values = FrozenValues({"part": part})
    part.data = torch.randn(4, 4)
    assert values.changed({}) == values.changed_exactly({}) == []
