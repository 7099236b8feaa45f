"""Read the source code of the user's classes, to find out what their methods do."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from types import CodeType, FunctionType, MethodType

from lightning_lora.foreign import FRAMEWORKS

WORDS = (
    "init|initialize|reset|tie|load|save|prune|resize|export|freeze|repr|set|quantize|decay|optimizers?|enable|disable"
)
# Names of methods that prepare, save or change a module, and compute no output.
NOT_COMPUTING = re.compile(rf"__\w+__|(?:.*_)?(?:{WORDS})(?:_.*)?")


def is_library(cls: type | FunctionType) -> bool:
    """Whether a class or function belongs to torch, Lightning or this package, not to the user or a model's library."""
    return cls.__module__.partition(".")[0] in FRAMEWORKS


def computing_methods(cls: type, words: Iterable[str]) -> Iterator[tuple[str, ast.AST]]:
    """Iterate over the names and code of the methods of ``cls`` that compute an output and use one of ``words``.

    The words come from the compiled code; only the source of methods that use one is read and parsed.
    """
    wanted = set(words)
    for name, function in functions_of(cls):
        if not NOT_COMPUTING.fullmatch(name) and wanted & words_in(function.__code__):
            yield from ((name, tree) for tree in _parsed(function))


def functions_of(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions that the user's classes among the bases of ``cls`` define, those of properties too."""
    for base in cls.__mro__:
        if not is_library(base):
            for name, value in vars(base).items():
                function = function_of(value)
                if function is not None:
                    yield name, function


def function_of(value: object) -> FunctionType | None:
    """The Python function behind a method, a property or a partial call; ``None`` if there is none."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (cached_property, partial)):
        value = value.func
    elif isinstance(value, MethodType):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def names_in(code: CodeType) -> set[str]:
    """The names that ``code`` and its nested functions use."""
    nested = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(names_in, nested))


def words_in(code: CodeType) -> set[str]:
    """The names that ``code`` uses, and its strings, which ``getattr`` may be given."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    strings = {const for const in code.co_consts if isinstance(const, str)}
    return names_in(code) | strings.union(*map(words_in, nested))


def is_linear_forward(forward: object) -> bool:
    """Whether the code of a ``forward(self, x)`` is ``return F.linear(x, self.weight)``, with or without a bias."""
    function = function_of(forward)
    tree = next(_parsed(function), None) if function is not None else None
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None) if tree else None
    if definition is None or len(definition.args.args) != 2:
        return False
    first, x = (argument.arg for argument in definition.args.args)
    body = [
        line for line in definition.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
    ]
    written = ast.unparse(body[0]) if len(body) == 1 else ""
    bias = rf"(?:, (?:bias=)?(?:None|{first}\.bias))?"
    return re.fullmatch(rf"return (?:\w+\.)*linear\({x}, {first}\.weight{bias}\)", written) is not None


def _parsed(function: FunctionType) -> Iterator[ast.AST]:
    try:
        source = inspect.getsource(function)
        yield ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):  # a function without a source file
        return
