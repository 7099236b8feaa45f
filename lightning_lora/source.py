"""The source of the user's classes, where there is one: some questions only their code answers."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

LIBRARIES = ("torch.", "lightning", "pytorch_lightning", "builtins")
# Methods that handle a module without computing an output.
HANDLING = re.compile(
    r".*(?:init|reset|tie|load|save|prune|resize|export|freeze|repr|get_|set_|quant|decay|optim|enable|disable).*"
)


def computing_methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods with which ``cls``, of the user's or of a library of models, computes its outputs."""
    for base in cls.__mro__:
        if not base.__module__.startswith(LIBRARIES):
            yield from (method for method in _methods_in(base) if not HANDLING.fullmatch(method.name))


def _methods_in(cls: type) -> Iterator[ast.FunctionDef]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # a class without a file
        return
    yield from (node for node in getattr(definition, "body", ()) if isinstance(node, ast.FunctionDef))
