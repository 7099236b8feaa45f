"""An injection surveys the model once, and goes down through the rooms: survey, resolve, inject, freeze."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora, names, plan_lora
from lightning_lora.targets import survey
from tests.helpers.floors import FLOOR

PACKAGE = Path(lightning_lora.__file__).parent
WALKS = ("named_modules", "modules", "named_parameters", "parameters", "named_buffers", "buffers", "state_dict")


class NamedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4, 4) for _ in range(4))
        self.fc1, self.fc2, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(NamedBlock() for _ in range(3))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.norm, self.lm_head = nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed.weight


CONFIGS = [
    LoRAConfig(r=2),
    LoRAConfig(r=2, targets="qv", bias="all"),
    LoRAConfig(
        r=2, targets=["q_proj", "fc*", "encoder.linear1"], exclude=["layers.1"], also_train=["norm"], bias="lora_only"
    ),
]


def walks(function, model: nn.Module, config: LoRAConfig, monkeypatch) -> list[str]:
    """The calls on `model` itself that list everything in it, while `function` runs.

    Of torch's own methods one may call another: only the calls from outside of torch are counted.
    """
    calls = []

    def counted(name, original):
        def walk(self, *args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if self is model and "/torch/" not in caller:
                calls.append(name)
            return original(self, *args, **kwargs)

        return walk

    with monkeypatch.context() as patch:
        for name in WALKS:
            patch.setattr(nn.Module, name, counted(name, getattr(nn.Module, name)))
        every_module = counted("every_module", names.every_module)
        for module in (names, survey):
            patch.setattr(module, "every_module", every_module)
        function(model, config)
    return calls


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("function", [apply_lora, plan_lora])
def test_one_walk_of_the_model(function, config, monkeypatch):
    assert walks(function, Transformer(), config, monkeypatch) == ["every_module"]


def test_one_walk_where_the_model_is_adapted_already(monkeypatch):
    model = Transformer()
    apply_lora(model, CONFIGS[0])
    assert walks(apply_lora, model, CONFIGS[0], monkeypatch) == ["every_module"]


def room_of(code) -> str | None:
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE).with_suffix("").parts[0] if path.is_relative_to(PACKAGE) else None


def calls_with_the_model(model: nn.Module, config: LoRAConfig) -> list[tuple[str | None, str]]:
    """For each call in `apply_lora` that gets the model or its survey as an argument: the rooms of caller and callee.

    To make a survey or to read it is no such call.
    """
    calls, seen = [], {}

    def note(frame, event, argument):
        code = frame.f_code
        if event != "call" or room_of(code) is None or id(frame) in seen:  # a generator is entered many times
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names]
        reads = code.co_filename == survey.__file__ or code.co_name in ("every_module", "visit")  # which lists for it
        if not reads and any(value is model or isinstance(value, survey.Survey) for value in values):
            seen[id(frame)] = frame  # kept, so that its id is not used again
            calls.append((room_of(frame.f_back.f_code), room_of(code)))

    sys.setprofile(note)
    try:
        apply_lora(model, config)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_model_goes_down_through_the_rooms(config):
    calls = calls_with_the_model(Transformer(), config)
    assert not [(caller, callee) for caller, callee in calls if caller and FLOOR[caller] < FLOOR[callee]]
    order = [FLOOR[callee] for _, callee in calls]
    assert len(calls) > 10
    climbs = [pair for pair in pairwise(order) if pair[0] < pair[1]]  # of two calls in a row
    assert len(climbs) <= 8, climbs


def test_a_name_that_the_adapters_have_no_room_for_changes_nothing():
    model = Transformer()
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=r"`name` must not be an attribute of nn\.ModuleDict.*'keys'"):
        apply_lora(model, LoRAConfig(name="keys"))
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys
