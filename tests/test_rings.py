"""The three rings: imports are read from the sources, and the map in the package's docstring is kept true."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
FILES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
LIBRARIES = {0: {"torch", "triton"}, 1: {"torch", "safetensors", "torchmetrics", "numpy", "deepspeed"}}
LIBRARIES[2] = LIBRARIES[1] | {
    "lightning",
    "lightning_utilities",
    "pytorch_lightning",
    "jsonargparse",
    "tqdm",
    "typing_extensions",
}


def rings() -> dict[str, int]:
    """The ring of each file, as the package's docstring tells it."""
    found, ring = {}, None
    for line in lightning_lora.__doc__.splitlines():
        if heading := re.match(r"Ring (\d)", line):
            ring = int(heading[1])
        elif entry := re.match(r"    (\w+) +\S", line):
            found[entry[1]] = ring
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "lightning_lora"}
    return names - {"lightning_lora"}


def test_the_docstring_tells_every_file():
    assert rings().keys() == FILES.keys()


@pytest.mark.parametrize("stem", FILES)
def test_imports_point_downward(stem):
    ring = rings()
    for name in imports(FILES[stem]):
        top, _, inner = name.partition(".")
        if top == "lightning_lora":
            assert ring[inner.split(".")[0]] <= ring[stem], f"{stem} imports {inner}"
        else:
            assert top in sys.stdlib_module_names or top in LIBRARIES[ring[stem]], f"{stem} imports {top}"


def test_one_file_imports_lightning():
    lightning = {
        stem for stem, path in FILES.items() if any(n.startswith(("lightning.", "pytorch_")) for n in imports(path))
    }
    assert lightning == {"lightnings", "run"}, "`run` inside a function, when Lightning is there"


def test_no_circle():
    graph = {
        stem: {n.split(".")[1] for n in imports(path) if n.startswith("lightning_lora.")}
        for stem, path in FILES.items()
    }
    done: set[str] = set()
    while ready := {stem for stem, below in graph.items() if stem not in done and below <= done}:
        done |= ready
    assert done == graph.keys(), f"a circle among {graph.keys() - done}"


def test_files_are_small():
    sizes = {stem: len(path.read_text().splitlines()) for stem, path in FILES.items()}
    assert max(sizes.values()) <= 300, max(sizes, key=sizes.get)
