"""The states of optimizers by the names of parameters: torch stores them by position.

A run that trains an adapter more than the run it resumes, or one fewer, has other positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora.names import named_parameters
from lightning_lora.trainer.checkpointing.contents import KEY, OPTIMIZER_NAMES
from lightning_lora.trainer.optimizers import seed_missing
from lightning_lora.trainer.patching import patch_method

Names = list[list[list[str]]]


def names_of(optimizers: Sequence[Optimizer], module: nn.Module) -> Names | None:
    """The names of the parameters in ``optimizers``, by group; ``None`` if one holds what is no parameter."""
    label = {id(parameter): name for name, parameter in named_parameters(module)}
    groups = [[group["params"] for group in optimizer.param_groups] for optimizer in optimizers]
    names = [[[label.get(id(p), "") for p in group] for group in of_optimizer] for of_optimizer in groups]
    return None if any("" in group for of_optimizer in names for group in of_optimizer) else names


def load_by_names(stack: ExitStack, strategy: Any, module: nn.Module) -> None:
    """Let ``strategy`` load the states of its optimizers by names until ``stack`` closes."""

    def load(original: Any, checkpoint: dict[str, Any]) -> None:
        original(matched(checkpoint, strategy.optimizers, module))
        seed_missing(strategy.optimizers)

    patch_method(stack, strategy, "load_optimizer_state_dict", load)


def matched(checkpoint: dict[str, Any], optimizers: Sequence[Optimizer], module: nn.Module) -> dict[str, Any]:
    """``checkpoint`` with its states at the positions that their parameters have in ``optimizers``.

    A parameter that the file does not know gets no state. Where the numbers of optimizers or groups differ, or the file
    has no names, it stays as it is, and torch says what does not fit.
    """
    written, now = checkpoint.get(KEY, {}).get(OPTIMIZER_NAMES), names_of(optimizers, module)
    states = checkpoint.get("optimizer_states")
    if written is None or now is None or states is None or written == now:
        return checkpoint
    if list(map(len, written)) != list(map(len, now)) or len(states) != len(now):
        return checkpoint
    return {**checkpoint, "optimizer_states": [_moved(*each) for each in zip(states, written, now, strict=True)]}


def _moved(state: dict[str, Any], written: list[list[str]], now: list[list[str]]) -> dict[str, Any]:
    pairs = zip(written, state["param_groups"], strict=True)
    place_of = {name: at for names, group in pairs for name, at in zip(names, group["params"], strict=True)}
    new: dict[int, Any] = {}
    groups, counter = [], count()
    for names, group in zip(now, state["param_groups"], strict=True):
        places = [next(counter) for _ in names]
        new |= {
            at: state["state"][place_of[name]]
            for at, name in zip(places, names, strict=True)
            if place_of.get(name) in state["state"]
        }
        groups.append({**group, "params": places} | ({"param_names": names} if "param_names" in group else {}))
    return {**state, "state": new, "param_groups": groups}
