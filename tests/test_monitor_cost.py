"""The script that measures what LoRAMonitor costs, at small shapes, and the result that it wrote."""

from __future__ import annotations

import datetime
import importlib
import logging
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    log = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(log, "level", log.level)
    for name in ("methods", "monitor"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    return importlib.import_module("monitor")


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.strip().splitlines()[-1].split("|")[1:-1]]


@pytest.mark.slow
def test_every_measurement_is_timed(script, tmp_path):
    times = script.measure(script.TINY, 5, 2, "cpu", tmp_path)
    assert len(times.measurements) == 4  # before the first step, after 2 and 4, at the end
    assert all(each > 0 for each in times.measurements) and sum(times.measurements) < times.run


@pytest.mark.slow
def test_it_writes_a_table(script, tmp_path, capsys):
    assert script.main(["--tiny", "--out", str(tmp_path / "cost")]) == 0
    text = (tmp_path / f"cost_{datetime.date.today()}.md").read_text()
    assert text in capsys.readouterr().out and "`python examples/benchmarks/monitor.py --tiny`" in text
    assert len(cells(text)) == 4 and cells(text)[-1].endswith("%")


def test_the_committed_result_is_below_one_percent_on_a_cpu():
    (result,) = BENCHMARKS.glob("monitor_*.md")
    of_cpu, of_gpu = result.read_text().split("## On a GPU")
    assert float(cells(of_cpu)[-1].removesuffix("%")) < 1
    assert "above the 1 % that was asked for" in of_gpu
