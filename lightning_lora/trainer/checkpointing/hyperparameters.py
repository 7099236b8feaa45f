"""Callbacks in the hyperparameters of a checkpoint: they are stored as their arguments, which are plain data.

A module that calls ``save_hyperparameters()`` over the arguments of its Trainer keeps the callback there. A pickled
object in the file would make ``torch.load(weights_only=True)`` refuse all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from lightning_lora.foreign import is_a

PLACES = ("hyper_parameters", "datamodule_hyper_parameters")
CALLBACK, ARGUMENTS = "lightning_lora_callback", "arguments"


def plain_callbacks(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """``checkpoint`` with the arguments of each callback of this package in place of the callback.

    A sub-class of the user's own stays an object: only its own code knows its arguments.
    """
    return _replace_in(checkpoint, _plain)


def with_callbacks(checkpoint: dict[str, Any], classes: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """The reverse of :func:`plain_callbacks`.

    Args:
        checkpoint: as it was read.
        classes: the callbacks by the names of their classes.
    """

    def made(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {CALLBACK, ARGUMENTS} and value[CALLBACK] in classes:
            return classes[value[CALLBACK]](**value[ARGUMENTS])
        return value

    return _replace_in(checkpoint, made)


def _plain(value: Any) -> Any:
    if not is_a(value, "MethodCallback") or type(value).__module__.partition(".")[0] != "lightning_lora":
        return value
    arguments, taken = (
        {**value.method.config.to_dict(), **value.run_config.to_dict()},
        signature(type(value)).parameters,
    )
    return {CALLBACK: type(value).__name__, ARGUMENTS: {key: arguments[key] for key in arguments if key in taken}}


def _replace_in(checkpoint: dict[str, Any], replace: Callable[[Any], Any]) -> dict[str, Any]:
    return {**checkpoint, **{key: _walk(checkpoint[key], replace) for key in PLACES if key in checkpoint}}


def _walk(value: Any, replace: Callable[[Any], Any]) -> Any:
    """``value`` with what is in its dictionaries, lists and tuples replaced; itself where nothing is."""
    new = replace(value)
    if new is not value:
        return new
    if type(value) is dict:
        entries = {key: _walk(entry, replace) for key, entry in value.items()}
        return entries if any(entries[key] is not entry for key, entry in value.items()) else value
    if type(value) in (list, tuple):
        items = [_walk(item, replace) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
