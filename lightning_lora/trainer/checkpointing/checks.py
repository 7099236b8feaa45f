"""What a run's checkpoint may hold: every part is checked when the file is opened, before a module is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.random_state import is_random_state
from lightning_lora.files.json_files import is_name, shown
from lightning_lora.model.fingerprint import is_fingerprint
from lightning_lora.model.report.plan import plan_lora
from lightning_lora.peft_format.task import CLASSES, recorded_classes
from lightning_lora.trainer.checkpointing.contents import OPTIMIZER_NAMES

ENTRIES = "entries"  # the names in the state dict, as they were written
Facts = Mapping[str, Any]


def check_weights(state: Any) -> None:
    """Raise unless ``state`` has the form of a state dict with names that can be printed.

    Raises:
        ValueError: naming the first entry that has no such name.
    """
    if not isinstance(state, dict):
        raise ValueError("its weights are no dict")
    for name in state:
        if not is_name(name):
            raise ValueError(f"{shown(name)} is no name of a weight")


def check_facts(facts: Any, state: Mapping[str, Any]) -> None:
    """Raise unless the parts that ``facts`` records have their form, and ``state`` holds the recorded entries.

    Raises:
        ValueError: naming the first part that is wrong.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ValueError("its configuration is missing")
    if not is_fingerprint(facts.get("base")):
        raise ValueError("the fingerprint of its base is missing or damaged")
    scale = _run(facts).get("lr_scale", 1.0)
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"its `lr_scale` is {shown(scale)}")
    states = facts.get("random_states")
    if states is not None and not (isinstance(states, list) and all(map(is_random_state, states))):
        raise ValueError("its random state is damaged")
    if facts.get(OPTIMIZER_NAMES) is not None and not _is_names(facts[OPTIMIZER_NAMES]):
        raise ValueError("the names of the parameters in its optimizers are damaged")
    recorded_classes(facts.get(CLASSES))
    _check_entries(facts.get(ENTRIES), state)


def _is_names(value: Any) -> bool:
    """Whether ``value`` has the form of names of parameters by optimizer and group."""
    of_optimizers = value if isinstance(value, list) else [None]
    groups = [group for each in of_optimizers for group in (each if isinstance(each, list) else [None])]
    return all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups)


def _check_entries(written: Any, state: Mapping[str, Any]) -> None:
    if written is None:  # files of older versions do not record them
        return
    if not isinstance(written, list) or not all(isinstance(name, str) for name in written):
        raise ValueError("the list of its weights is damaged")
    for name in sorted(state.keys() ^ set(written)):
        raise ValueError(f"it {'holds' if name in state else 'lacks'} {shown(name)}, other than when it was written")


def _run(facts: Facts) -> Mapping[str, Any]:
    run = facts.get("run", facts["config"])
    return run if isinstance(run, dict) else {}


def check_pairs(names: Iterable[str], state: Mapping[str, Any]) -> None:
    """Raise unless every A and B in ``state`` of these adapters is a plain matrix of real numbers, or a stack of such.

    Raises:
        ValueError: naming the first that is not.
    """
    half = re.compile(rf"(?:.*\.)?lora\.(?:{'|'.join(names)})\.(?:.+\.)?[AB]")
    for key, value in state.items():
        if half.fullmatch(key) and not (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() in (2, 3)
            and value.layout == torch.strided
        ):
            raise ValueError(f"{shown(key)} is {_kind(value)}, and must be a matrix of real numbers")


def _kind(value: Any) -> str:
    return (
        f"a {value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    )


def check_room(module: nn.Module, configs: Iterable[LoRAConfig], state: Mapping[str, Any]) -> None:
    """Raise if the adapters of ``configs`` would be larger than those in ``state``: before their memory is taken.

    Raises:
        ValueError: with both sizes.
    """
    needed = sum(row.parameters for config in configs for row in plan_lora(module, config).rows)
    held = sum(value.numel() for key, value in state.items() if ".lora." in f".{key}" and isinstance(value, Tensor))
    if needed > held:
        raise ValueError(
            f"The adapter does not fit the model: its configuration needs {needed:,} numbers, and the file holds "
            f"{held:,}. Is it the model that it was trained on?"
        )
