"""State dicts of the whole module that callbacks put into a checkpoint: the file leaves the base out of them.

A callback gets its state back as it gave it: what was left out is filled from the base of the run that resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.model.state import clean_state
from lightning_lora.names import clean
from lightning_lora.ops.exact_sum import same_bits

KEYS = "lightning_lora_keys"  # in a state dict: its keys before the base was left out, in their order


def own_names(keys: Any, needed: set[str]) -> dict[Any, str]:
    """The module's own names for the keys of a state dict of it, or of an ``AveragedModel`` or DDP around it.

    Empty unless every name that is ``needed`` is among them.
    """
    names = {key: clean(key) for key in keys if isinstance(key, str)}
    inner = {key: name.removeprefix("module.") for key, name in names.items()}
    return next((each for each in (names, inner) if needed and needed <= set(each.values())), {})


def without_base_values(states: dict[Any, Any], model: nn.Module, frozen: set[str], base: set[str]) -> dict[Any, Any]:
    """``states`` without the values that are the base's, bit for bit; itself where it holds no whole state dict.

    Args:
        states: dictionaries in dictionaries.
        model: whose state dicts may be among them.
        frozen: the names of its parameters that do not train.
        base: the names of all that a file leaves out.
    """
    names = own_names(states, frozen)
    if names:
        values = clean_state(model)
        dropped = {key for key, name in names.items() if name in base and _is_equal(states[key], values[name])}
        kept = {key: value for key, value in states.items() if key not in dropped}
        return {**kept, KEYS: list(states)} if dropped else states
    inner = {
        key: without_base_values(value, model, frozen, base) for key, value in states.items() if isinstance(value, dict)
    }
    return {**states, **inner} if any(value is not states[key] for key, value in inner.items()) else states


def _is_equal(value: Any, of_the_base: Any) -> bool:
    """Whether two plain tensors have the same bits; a sharded one is compared with nothing."""
    if any(type(each) not in (Tensor, nn.Parameter) for each in (value, of_the_base)):
        return False
    return same_bits(value, of_the_base)


def with_base_values(states: dict[Any, Any], model: nn.Module) -> dict[Any, Any]:
    """The reverse of :func:`without_base_values`, with values of ``model`` that are copied to the CPU."""
    if KEYS in states:
        values = clean_state(model)
        return {key: states[key] if key in states else _value_of(key, values) for key in states[KEYS]}
    inner = {key: with_base_values(value, model) for key, value in states.items() if isinstance(value, dict)}
    return {**states, **inner} if any(value is not states[key] for key, value in inner.items()) else states


def _value_of(key: str, values: Mapping[str, Any]) -> Tensor:
    name = clean(key)
    value: Tensor = values[name if name in values else name.removeprefix("module.")]
    return value.detach().to("cpu", copy=True)
