"""The source of the user's classes, where there is one: some questions only their code answers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_lora", "builtins"}
WORDS = (
    "init|initialize|reset|tie|load|save|prune|resize|export|freeze|repr|set|quantize|decay|optimizers?|enable|disable"
)
# Names of methods that prepare, save or change a module, and compute no output.
NOT_COMPUTING = re.compile(rf"__\w+__|(?:.*_)?(?:{WORDS})(?:_.*)?")


def is_library(cls: type) -> bool:
    """Whether ``cls`` is neither the user's nor of a library of models."""
    return cls.__module__.partition(".")[0] in LIBRARIES


def computing_methods(cls: type, words: Iterable[str]) -> Iterator[ast.AST]:
    """The methods with which ``cls``, of the user's or of a library of models, computes, and that use any of ``words``.

    What a method uses is told by its code; only then is its source read and parsed.
    """
    wanted = set(words)
    for base in cls.__mro__:
        if is_library(base):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if not inspect.isfunction(function) or NOT_COMPUTING.fullmatch(name):
                continue
            if wanted & names_in(function.__code__):
                yield from _parsed(function)


def names_in(code: CodeType) -> set[str]:
    """The names that ``code`` and the functions in it use."""
    inside = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(names_in, inside))


def _parsed(function: FunctionType) -> Iterator[ast.AST]:
    try:
        source = inspect.getsource(function)
        yield ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):  # a function without a file
        return
