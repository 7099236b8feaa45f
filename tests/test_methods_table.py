"""The table of methods, at small shapes."""

from __future__ import annotations

import datetime
import importlib
import logging
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    # What the script sets for its own process must not outlive the test: the seed, the level of the log.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    log = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(log, "level", log.level)
    monkeypatch.delitem(importlib.sys.modules, "methods", raising=False)
    return importlib.import_module("methods")


def rows(script: ModuleType, folder: Path, *words: str) -> dict[str, list[str]]:
    assert script.main(["--tiny", "--out", str(folder / "table"), *words]) == 0
    text = (folder / f"table_{datetime.date.today()}.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: values for name, *values in cells if name}


@pytest.mark.slow
def test_a_row_of_two_methods(script, tmp_path):
    assert rows(script, tmp_path, "--only", "head").keys() == {"head (linear probe)"}
    trained, *_ = rows(script, tmp_path, "--only", "no callback")[script.PLAIN]
    assert int(trained.replace(",", "")) == sum(p.numel() for p in script.classifier(script.TINY).parameters())


@pytest.mark.slow
def test_every_method_has_a_row(script, tmp_path):
    table = rows(script, tmp_path)
    assert list(table) == [script.PLAIN, *script.methods(tmp_path)]
    for trained, checkpoint, *times in table.values():
        assert int(trained.replace(",", "")) >= 66 and float(checkpoint.replace(",", "")) > 0
        assert all(float(time) >= 0 for time in times)
