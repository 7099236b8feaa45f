"""Find code that reads the weight of a layer instead of calling it, as in ``F.linear(x, self.fc.weight)``.

Such code bypasses the forward of an adapted layer, so its parameter is adapted instead
(:mod:`lightning_lora.layers.parameter`). The source of the classes around the layer is searched; local names and loops
are followed. Code that the forward cannot reach does not count. A false positive costs time, not correctness.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any

from torch import nn

from lightning_lora.layers.reachable import reachable_names
from lightning_lora.layers.source_code import computing_methods

# Attributes and functions of a weight that do not depend on its values.
FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "layout", "stride"}
QUESTIONS = {"isinstance", "hasattr", "id", "type"}


class WeightReads:
    """What the code of a model reads of its layers.

    Args:
        modules: the modules of the model by name, the model itself under the empty name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    def is_read_raw(self, name: str, key: str) -> bool:
        """Whether code around the layer ``name`` reads its parameter ``key``, in a method that the forward reaches."""
        parts = name.split(".")
        for length in range(len(parts)):
            cls: Any = type(self.modules.get(".".join(parts[:length])))
            path = ".".join(parts[length:])
            if any(_covers(read, path) and self._is_reached(method) for method, read in paths_read(cls, key)):
                return True
        return False

    def _is_reached(self, method: str) -> bool:
        return method in self._reachable

    @cached_property
    def _reachable(self) -> set[str]:
        return reachable_names(self.modules)


def _covers(read: str, path: str) -> bool:
    return path == read or (read.endswith(".*") and path.startswith(read[:-1]))


@cache
def paths_read(cls: Any, key: str) -> frozenset[tuple[str, str]]:
    """The methods of ``cls`` that read ``key`` of modules, each with a path to such; ``layers.*`` is all inside."""
    return frozenset((name, path) for name, method in computing_methods(cls, [key]) for path in _paths_in(method, key))


def _paths_in(method: ast.AST, key: str) -> Iterator[str]:
    first = next((f.args.args[0].arg for f in ast.walk(method) if isinstance(f, ast.FunctionDef) and f.args.args), "")
    local_names = _local_names(method, first)
    not_values = {id(node) for outer in ast.walk(method) for node in _not_values(outer)}
    for node in ast.walk(method):
        owner = _owner(node, key)
        if owner is not None and id(node) not in not_values:
            yield from _paths(owner, first, local_names)


def _owner(node: ast.AST, key: str) -> ast.expr | None:
    """The expression whose parameter ``key`` is read by ``node``."""
    if isinstance(node, ast.Attribute) and node.attr == key:
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args[1:]:
        named = node.args[1]
        return node.args[0] if isinstance(named, ast.Constant) and named.value == key else None
    return None


def _not_values(node: ast.AST) -> list[ast.expr]:
    """The expressions of which ``node`` uses no value."""
    if isinstance(node, ast.Attribute) and node.attr in FACTS:
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in QUESTIONS:
        return node.args
    return []


def _local_names(method: ast.AST, first: str) -> dict[str, set[str]]:
    """The local names that hold modules, or iterate over them, with the paths of the modules."""
    paths_of: dict[str, set[str]] = {}
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
                    paths_of.setdefault(inner.id, set()).update(paths)
    return paths_of


def _paths(owner: ast.AST, first: str, local_names: dict[str, set[str]]) -> Iterator[str]:
    direct = _path(owner, first)
    if direct:
        yield direct
        return
    for inner in ast.walk(owner):
        name = inner.id if isinstance(inner, ast.Name) else ""
        for path in {_path(inner, first), *local_names.get(name, ())} - {""}:
            yield from (path, f"{path}.*")


def _path(node: ast.AST, first: str) -> str:
    """``attn.q_proj`` for ``self.attn.q_proj``; empty if it does not start at ``self``, the ``first`` argument."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) and node.id == first else ""
