"""The rooms of the package: imports point downward, and each room states its rule. Both are read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lightning_lora
from tests.helpers.floors import FLOOR

PACKAGE = Path(lightning_lora.__file__).parent
FILES = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE})

OWN = {"lightning_lora"}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
LIBRARIES = {
    "ops": {"torch", "triton"},
    "distributed": {"torch", "numpy", "deepspeed"},
    "files": {"torch", "safetensors"},
    "peft_format": {"torch", "safetensors"},
    "analysis": {"torch", "torchmetrics", "matplotlib"},
    "methods": {"torch", "typing_extensions"},
    "trainer": {"torch", "numpy", "safetensors", "typing_extensions"} | LIGHTNING,
    "cli": {"torch", "numpy", "safetensors", "jsonargparse", "matplotlib", "tqdm", "transformers"},
}


def room_of(file: str) -> str:
    return file.split("/")[0]


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements inside of `node`; it does not go through expressions, which are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield child
            yield from statements(child)


@cache
def imports(path: Path) -> set[str]:
    """The dotted names of all that `path` imports, at its top or inside a function."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> str:
    """The file of the package that defines or is `name`, which starts with `lightning_lora`."""
    parts = name.split(".")[1:]
    candidates = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    packages = [f"{candidate}/__init__" for candidate in candidates]
    return next((file for pair in zip(candidates, packages, strict=True) for file in pair if file in FILES), "__init__")


def own_imports(file: str) -> set[str]:
    return {file_of(name) for name in imports(FILES[file]) if name.split(".")[0] == "lightning_lora"}


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} == FLOOR.keys()


def test_imports_point_downward():
    pairs = [(file, below) for file in FILES for below in own_imports(file)]
    assert [
        f"{file} imports {below}"
        for file, below in pairs
        if room_of(below) != room_of(file) and FLOOR[room_of(below)] >= FLOOR[room_of(file)]
    ] == []


def test_a_room_imports_only_its_libraries():
    assert [
        f"{file} imports {name}"
        for file in FILES
        for name in imports(FILES[file])
        if name.split(".")[0] not in sys.stdlib_module_names | LIBRARIES.get(room_of(file), {"torch"}) | OWN
    ] == []


def test_private_names_of_torch_have_one_owner():
    assert [file for file, path in FILES.items() if "torch._C" in path.read_text()] == ["torch_internals"]


def test_no_file_is_in_a_circle_of_imports():
    below = {file: own_imports(file) - {file} for file in FILES}
    done: set[str] = set()
    while ready := {file for file in FILES if file not in done and below[file] <= done}:
        done |= ready
    assert done == FILES.keys(), f"a circle among {FILES.keys() - done}"


@pytest.mark.parametrize("room", [str(room.relative_to(PACKAGE)) for room in ROOMS])
def test_every_room_states_its_rule(room):
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert docstring is not None
    sentences = [part for part in docstring.replace("\n", " ").split(". ") if part]
    assert 2 <= len(sentences) <= 5


def test_sizes():
    own = [file for file in FILES if "/" not in file]
    assert len(own) <= 8, own
    for room in ROOMS:
        assert len(list(room.glob("*.py"))) <= 24, room
    longest = max(FILES, key=lambda file: len(FILES[file].read_text().splitlines()))
    assert len(FILES[longest].read_text().splitlines()) <= 300, longest
