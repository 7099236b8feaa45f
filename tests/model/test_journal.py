"""Every verb is all or nothing: an interrupt or an error at any line of the package leaves the model before or after.

All lines: ``python -m tests.helpers.interrupts``.
"""

from __future__ import annotations

import copy

import pytest
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from lightning_lora.model import journal, merge_layer
from tests.helpers.interrupts import (
    VERBS,
    check_lines,
    difference,
    first_middle_last,
    interrupt,
    lines_in,
    lines_of,
    state_of,
    subject,
)
from tests.helpers.models import EveryKind
from tests.helpers.real_signals import many_layers
from tests.helpers.scripts import run_script
from tests.helpers.selection import slow_except

pytestmark = pytest.mark.filterwarnings("ignore:.*was shared with another module")


@pytest.mark.slow
@pytest.mark.parametrize("verb", slow_except(["apply", "merge", "unmerge", "remove", "load"], VERBS))
def test_an_interrupt_at_a_few_lines_leaves_the_model_before_or_after(verb):
    total = len(lines_of(verb))
    assert check_lines(verb, [int(total * share) for share in (0.3, 0.7, 0.9, 0.97)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_many_lines_leaves_the_model_before_or_after(verb):
    lines = first_middle_last(lines_of(verb))
    chosen = lines[:: max(1, len(lines) // 40)]
    assert check_lines(verb, chosen[::2], KeyboardInterrupt) == []
    assert check_lines(verb, chosen[1::2], MemoryError) == []


@pytest.mark.slow
def test_a_real_signal_leaves_the_model_before_or_after():
    done = run_script("real_signals.py")
    assert done.returncode == 0, done.stderr[-3000:]


def interrupted_twice(monkeypatch, owner, name, calls):
    """A merge that is interrupted late, and while it is undone: at the call number `calls` of `owner.name`."""
    model = many_layers()
    original, count = getattr(owner, name), [0]

    def undo(self):
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        original(self)

    twin = copy.deepcopy(model)
    lines = len(lines_in(lambda: merge_lora(twin)))
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, undo)
        interrupt(lambda: merge_lora(model), lines - 5)
    assert count[0] == calls
    assert state_of(model) != before
    return model, before


UNDOING = [
    (merge_layer.MergedStep, "undo", 1),
    (merge_layer.MergedStep, "undo", 7),
    (journal.SavedModule, "restore", 5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "calls"), UNDOING)
def test_what_a_second_interrupt_left_is_completed_by_the_next_verb(owner, name, calls, monkeypatch):
    model, before = interrupted_twice(monkeypatch, owner, name, calls)
    merge_lora(model)
    unmerge_lora(model)
    assert difference(state_of(model), before) == []
    model, _ = interrupted_twice(monkeypatch, owner, name, calls)
    merge_lora(model)
    expected = many_layers()
    merge_lora(expected)
    assert difference(state_of(model), state_of(expected)) == []


@pytest.mark.parametrize(
    "verb", [remove_lora, unmerge_lora, lambda model: apply_lora(model, LoRAConfig(targets="all"))]
)
def test_whatever_the_next_verb_is(verb, monkeypatch):
    model, before = interrupted_twice(monkeypatch, merge_layer.MergedStep, "undo", 3)
    if verb is remove_lora:
        remove_lora(model)
        before = {key: value for key, value in before.items() if key in ("0.weight", "11.bias")}
        now = state_of(model)
        assert {key: now[key][3:] for key in before} == {key: value[3:] for key, value in before.items()}
        assert not list(lora_parameters(model))
    elif verb is unmerge_lora:
        unmerge_lora(model)
        assert difference(state_of(model), before) == []
    else:
        with pytest.raises(ValueError, match="this asks for `r=8` instead of `r=4`"):
            verb(model)
        with disable_lora(model):
            pass
        assert difference(state_of(model), before) == []


def test_a_failed_verb_leaves_no_journal_and_hooks_stay_the_same_objects():
    model = subject("live")
    handle = model.fc.register_forward_hook(lambda *_: None)
    interrupt(lambda: merge_lora(model), 3000)
    assert not any("journal" in key for module in model.modules() for key in vars(module))
    handle.remove()
    assert not model.fc._forward_hooks


class Sealed(nn.Linear):
    """Takes no other class."""

    __class__ = property(lambda self: Sealed)


def test_a_failed_injection_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4), Sealed(4, 4))
    before = state_of(model)
    with pytest.raises(AttributeError):
        apply_lora(model, LoRAConfig(targets="all"))
    assert difference(state_of(model), before) == []


def test_every_kind_of_layer_is_in_the_model():
    kinds = {type(module).__name__ for module in subject("live").modules()}
    assert {"LoRAEmbedding", "LoRAConv1d", "LoRALSTM", "LoRAMultiheadAttention", "LoRALinear"} <= kinds
    assert EveryKind().head.weight is not None
