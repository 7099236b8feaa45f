"""Which methods of a model's classes its forward can reach.

Code is compared by names: a method counts as called if code that counts uses its name. So a method may count that is
not called, but one that is called does not get lost. Methods that only a user calls, such as one that fuses
projections for inference, do not count.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from lightning_lora.foreign import LIGHTNING_HOOKS
from lightning_lora.layers.source_code import function_of, functions_of, is_library, names_in, words_in

ENTRIES = {"forward", "__call__"}


def reachable_names(modules: Mapping[str, nn.Module]) -> set[str]:
    """The names of methods that are called in a forward or a step of the model.

    Args:
        modules: the modules of the model by name, the model itself under the empty name.
    """
    methods = _methods(set(map(type, modules.values())))
    held = list(_held_functions(modules.values()))
    names = {*ENTRIES, *LIGHTNING_HOOKS, *_public_results(type(modules.get(""))), *(f.__name__ for f in held)}
    waiting = [*held, *(function for name in names for function in methods.get(name, ()))]
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        used = words_in(function.__code__) - names
        names |= used
        called = set(_called_globals(function)).union(*(methods.get(name, ()) for name in used)) - seen
        waiting += called
        seen |= called
    return names


@cache
def calls_autograd_function(cls: Any, key: str) -> bool:
    """Whether a method of ``cls`` that uses ``key``, or a function that it calls, may apply an autograd function."""
    users = [function for _, function in functions_of(cls) if key in names_in(function.__code__)]
    return any("apply" in names_in(f.__code__) for user in users for f in (user, *_called_globals(user)))


def _methods(classes: Iterable[type]) -> dict[str, set[FunctionType]]:
    methods: dict[str, set[FunctionType]] = {}
    for cls in classes:
        for name, function in functions_of(cls):
            methods.setdefault(name, set()).add(function)
    return methods


def _called_globals(function: FunctionType) -> Iterator[FunctionType]:
    """The functions of the user's modules that ``function`` uses."""
    names = names_in(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        values = [vars(value).get(inner) for inner in names] if isinstance(value, ModuleType) else [value]
        for called in map(function_of, values):
            if called is not None and not is_library(called):
                yield called


def _public_results(cls: type) -> set[str]:
    """The public methods of the model itself that return something: users may call them in place of its forward."""
    return {name for name, function in functions_of(cls) if name[0] != "_" and _returns(function.__code__)}


def _returns(code: CodeType) -> bool:
    """Whether ``code`` returns a value other than ``None``."""
    return any(
        (last.opname == "RETURN_VALUE" and (before.opname, before.argval) != ("LOAD_CONST", None))
        or (last.opname == "RETURN_CONST" and last.argval is not None)  # Python 3.12 and 3.13
        for before, last in pairwise(dis.get_instructions(code))
    )


def _held_functions(modules: Iterable[nn.Module]) -> Iterator[FunctionType]:
    """The functions that modules hold as attributes, and the methods of objects there that can be called."""
    classes: set[type] = set()
    for module in modules:
        for held in list(vars(module).values()):
            for value in held.values() if isinstance(held, dict) else held if isinstance(held, list) else [held]:
                if not callable(value) or isinstance(value, nn.Module):
                    continue
                function = function_of(value)
                if function is None:
                    classes.add(type(value))
                elif not is_library(function):
                    yield function
    for cls in classes:
        yield from (function for _, function in functions_of(cls))
