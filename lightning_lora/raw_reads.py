"""Whether the code around a layer reads its weight instead of calling it, as in ``F.linear(x, self.fc.weight)``.

It would pass the forward of an adapted layer by. So the source of the classes around is searched for it, and what such
code reads is then the sum (:mod:`lightning_lora.on_read`).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

# What is asked of a weight that is no value of it.
FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "layout", "stride"}
# Methods that handle weights without computing an output.
HANDLING = re.compile(r".*(?:init|reset|tie|load|save|prune|resize|export|freeze|repr|get_|set_|quant|decay|optim).*")


def is_read_raw(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the code of a module that ``name`` lies in reads ``self.<...>.weight`` of it."""
    parts = name.split(".")
    owners = ((".".join(parts[:length]), ".".join(parts[length:])) for length in range(len(parts)))
    return any(inside in raw_reads(type(modules[owner])) for owner, inside in owners if owner in modules)


@cache
def raw_reads(cls: type) -> frozenset[str]:
    """The modules, as paths from ``self``, whose weights the methods of ``cls`` read."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)] if nn.Module in cls.__mro__ else ()
    own = [base for base in bases if not base.__module__.startswith(("torch.", "lightning", "pytorch_lightning"))]
    return frozenset(path for base in own for path in _reads_in(base))


def _reads_in(cls: type) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # a class without a file: what it reads is found when it runs
        return
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and not HANDLING.fullmatch(method.name):
            asked = {id(node) for outer in ast.walk(method) for node in _asked_about(outer)}
            for node in ast.walk(method):
                if _is_weight(node) and id(node) not in asked:
                    yield from _path(node)


def _asked_about(node: ast.AST) -> list[ast.expr]:
    """The expressions of which ``node`` wants to know no value."""
    if isinstance(node, ast.Attribute) and node.attr in FACTS:
        return [node.value]
    named = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return node.args if isinstance(node, ast.Call) and named in ("isinstance", "hasattr", "id", "type") else []


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)


def _path(node: ast.AST) -> list[str]:
    """``attn.q_proj`` for ``self.attn.q_proj.weight``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [".".join(names[:-1])] if isinstance(node, ast.Name) and node.id == "self" and names[1:] else []
