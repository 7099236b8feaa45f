"""The source of the user's classes, where there is one: some questions only their code answers."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

LIBRARIES = ("torch.", "lightning", "pytorch_lightning", "builtins")
# Methods that handle a module without computing an output.
HANDLING = re.compile(
    r".*(?:init|reset|tie|load|save|prune|resize|export|freeze|repr|get_|set_|quant|decay|optim|enable|disable).*"
)


def computing_methods(cls: type, words: Iterable[str]) -> Iterator[ast.AST]:
    """The methods with which ``cls``, of the user's or of a library of models, computes, and that use any of ``words``.

    What a method uses is told by its code; only then is its source read and parsed.
    """
    wanted = set(words)
    for base in cls.__mro__:
        if base.__module__.startswith(LIBRARIES):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if inspect.isfunction(function) and not HANDLING.fullmatch(name) and wanted & _names_in(function.__code__):
                yield from _parsed(function)


def _names_in(code: CodeType) -> set[str]:
    inside = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


def _parsed(function: FunctionType) -> Iterator[ast.AST]:
    try:
        yield ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # a function without a file
        return
