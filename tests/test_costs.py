"""The benchmark of costs: every row of a small model, and the tables that are made of the result file."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def costs(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    log = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(log, "level", log.level)  # the script sets it for its own process
    return importlib.import_module("costs")


@pytest.mark.slow
def test_the_rows_differ_in_callback_and_precision_alone(costs, tmp_path, capsys):
    path = tmp_path / "costs.jsonl"
    assert costs.main(["--tiny", "--out", str(path)]) == 0
    heading, *rows = map(json.loads, path.read_text().splitlines())
    assert torch.__version__ in heading["versions"] and heading["command"].endswith("costs.py --tiny")
    fp32, bf16, qv, every = rows
    assert [row["method"] for row in rows] == list(costs.METHODS)
    assert fp32["trained"] == bf16["trained"] == fp32["parameters"]
    # q is 64 x 64, k and v 16 x 64, o 64 x 64, gate and up 128 x 64, down 64 x 128
    assert qv["trained"] == 8 * (64 + 64 + 64 + 16)
    assert every["trained"] == 16 * (2 * (64 + 64) + 2 * (64 + 16) + 3 * (64 + 128))
    capsys.readouterr()
    assert costs.main(["--report", str(path)]) == 0
    table = capsys.readouterr().out
    assert "| published: GPT-3 175 B" in table and table.count("| tiny, LoRA") == 4


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_sized_file_has_the_bytes_of_a_written_one(costs, tmp_path, weights_only):
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    checkpoint = {"state_dict": model.state_dict()}
    checkpoint |= {} if weights_only else {"optimizer_states": [optimizer.state_dict()]}
    costs.SizedFiles().save_checkpoint(checkpoint, tmp_path / "file")
    sized = (tmp_path / "file").stat().st_size
    torch.save(checkpoint, tmp_path / "file")
    assert sized == (tmp_path / "file").stat().st_size


def test_the_report_divides_by_full_fine_tuning_and_names_failures(costs):
    row = {"size": "7 B", "batch": 4, "length": 512, "parameters": 100, "resume_bytes": 1}
    full = {**row, "method": costs.MIXED, "ms": 200.0, "gib": 100.0, "trained": 100, "weights_bytes": 4_000_000}
    failed = {**row, "method": costs.BF16, "failure": "OutOfMemoryError: tried to allocate"}
    lora = {**row, "method": "LoRA", "ms": 150.0, "gib": 25.0, "trained": 1, "weights_bytes": 1_000}
    text = costs.report([{"versions": "a GPU", "command": "the call"}, full, failed, lora])
    assert f"| 7 B, LoRA, of {costs.MIXED} | 0.75 | 0.25 | 4,000 |" in text
    assert f"| 7 B, LoRA, of {costs.BF16} | not measured | | |" in text
    assert f"| {costs.BF16} | OutOfMemoryError" in text
    assert "4 x 512 tokens" in text
