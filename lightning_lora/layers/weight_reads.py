"""Whether the code around a layer reads its weight beside calling it, as in ``F.linear(x, self.fc.weight)``.

Such code bypasses the forward of an adapted layer. So the source of the classes around the layer is searched for it,
and what such code reads is the sum (:mod:`lightning_lora.layers.parameter`). Local names and loops are followed.
A false positive costs time, not correctness.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from lightning_lora.layers.source_code import computing_methods

# What is asked of a weight that is no value of it.
FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "layout", "stride"}
QUESTIONS = {"isinstance", "hasattr", "id", "type"}


def is_read_raw(name: str, key: str, module_at: Callable[[str], nn.Module | None]) -> bool:
    """Whether the code of a module that ``name`` lies in reads the parameter ``key`` of it."""
    parts = name.split(".")
    for length in range(len(parts) if name else 0):
        cls: Any = type(module_at(".".join(parts[:length])))
        inside = ".".join(parts[length:])
        read = paths_read(cls, key)
        if inside in read or any(inside.startswith(path[:-1]) for path in read if path.endswith(".*")):
            return True
    return False


@cache
def paths_read(cls: Any, key: str) -> frozenset[str]:
    """The modules, as paths from ``self``, whose ``key`` the methods of ``cls`` read; ``layers.*`` for all in there."""
    return frozenset(path for method in computing_methods(cls, [key, "getattr"]) for path in _paths_in(method, key))


def _paths_in(method: ast.AST, key: str) -> Iterator[str]:
    first = next((f.args.args[0].arg for f in ast.walk(method) if isinstance(f, ast.FunctionDef) and f.args.args), "")
    bound = _bound(method, first)
    asked = {id(node) for outer in ast.walk(method) for node in _asked_about(outer)}
    for node in ast.walk(method):
        holder = _holder(node, key)
        if holder is not None and id(node) not in asked:
            yield from _paths(holder, first, bound)


def _holder(node: ast.AST, key: str) -> ast.expr | None:
    """What ``node`` reads the parameter ``key`` of."""
    if isinstance(node, ast.Attribute) and node.attr == key and isinstance(node.ctx, ast.Load):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args[1:]:
        named = node.args[1]
        return node.args[0] if isinstance(named, ast.Constant) and named.value == key else None
    return None


def _asked_about(node: ast.AST) -> list[ast.expr]:
    """The expressions of which ``node`` wants to know no value."""
    if isinstance(node, ast.Attribute) and node.attr in FACTS:
        return [node.value]
    asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in QUESTIONS
    return node.args if asks and isinstance(node, ast.Call) else []


def _bound(method: ast.AST, first: str) -> dict[str, set[str]]:
    """The local names that stand for modules, or run over them, with the paths of those."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(method):
        pairs: list[tuple[ast.AST, ast.AST]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, node.value)]
        for target, value in pairs:
            paths = {path for inner in ast.walk(value) if (path := _path(inner, first))}
            for inner in ast.walk(target):
                if isinstance(inner, ast.Name) and paths:
                    found.setdefault(inner.id, set()).update(paths)
    return found


def _paths(holder: ast.AST, first: str, bound: dict[str, set[str]]) -> Iterator[str]:
    direct = _path(holder, first)
    if direct:
        yield direct
        return
    for inner in ast.walk(holder):
        name = inner.id if isinstance(inner, ast.Name) else ""
        for path in {_path(inner, first), *bound.get(name, ())} - {""}:
            yield from (path, f"{path}.*")


def _path(node: ast.AST, first: str) -> str:
    """``attn.q_proj`` for ``self.attn.q_proj``; nothing for what does not start at ``self``, the ``first`` argument."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) and node.id == first else ""
