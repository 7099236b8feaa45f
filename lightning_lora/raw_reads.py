"""Whether the code around a layer reads its weight instead of calling it, as in ``F.linear(x, self.fc.weight)``.

It would pass the forward of an adapted layer by. So the source of the classes around is searched for it, and what such
code reads is then the sum (:mod:`lightning_lora.on_read`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from lightning_lora.source import computing_methods

# What is asked of a weight that is no value of it.
FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "layout", "stride"}
QUESTIONS = {"isinstance", "hasattr", "id", "type"}


def is_read_raw(name: str, module_at: Callable[[str], nn.Module | None]) -> bool:
    """Whether the code of a module that ``name`` lies in reads ``self.<...>.weight`` of it."""
    parts = name.split(".")
    for length in range(len(parts)):
        cls: Any = type(module_at(".".join(parts[:length])))
        if ".".join(parts[length:]) in paths_read(cls):
            return True
    return False


@cache
def paths_read(cls: Any) -> frozenset[str]:
    """The modules, as paths from ``self``, whose weights the methods of the class ``cls`` read."""
    return frozenset(path for method in computing_methods(cls, ["weight"]) for path in _paths_in(method))


def _paths_in(method: ast.AST) -> Iterator[str]:
    asked = {id(node) for outer in ast.walk(method) for node in _asked_about(outer)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and id(node) not in asked:
                yield path


def _asked_about(node: ast.AST) -> list[ast.expr]:
    """The expressions of which ``node`` wants to know no value."""
    if isinstance(node, ast.Attribute) and node.attr in FACTS:
        return [node.value]
    asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in QUESTIONS
    return node.args if asks and isinstance(node, ast.Call) else []


def _path(node: ast.AST) -> str:
    """``attn.q_proj`` for ``self.attn.q_proj``; nothing for what does not start at ``self``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) and node.id == "self" else ""
