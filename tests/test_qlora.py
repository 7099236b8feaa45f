"""The benchmark of a base in four bits, at small shapes, and what its bars compare."""

from __future__ import annotations

import datetime
import importlib
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.helpers.scripts import run_script

pytest.importorskip("transformers")
pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
ROWS = [
    *("bound", "lightning_lora", "peft, bf16 adapters", "peft, fp32 adapters"),
    *("lightning_lora, NF4", "peft, fp32 adapters, NF4", "peft, bf16 adapters, NF4"),
]


@pytest.fixture
def qlora(monkeypatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("qlora")
    monkeypatch.setattr(script, "has_torchao", lambda: False)
    return script


@pytest.mark.slow
def test_a_section_is_appended_with_a_table_for_each_batch(qlora, tmp_path):
    assert qlora.main(["--targets", "qv", "--tiny", "--out", str(tmp_path / "qlora")]) == 0
    text = (tmp_path / f"qlora_{datetime.date.today()}.md").read_text()
    tables = [line.strip("| ").split(" | ")[0] for line in text.splitlines() if re.match(r"\| [^|]", line)]
    assert tables == ROWS * 2 and "bitsandbytes 0." in text and "Error" not in text
    assert "`python examples/benchmarks/qlora.py --targets qv --tiny`" in text
    assert len([line for line in text.splitlines() if line.startswith("Bar: lightning_lora, NF4, speed")]) == 4


def test_every_model_is_what_its_row_says(qlora):
    for name, make in qlora.models(["q_proj"], 2, "tiny").items():
        model = make()
        layers = {
            key: module for key, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
        assert len(layers) == 7 * name.endswith("NF4") and not any("lm_head" in key for key in layers)
        for layer in layers.values():
            assert layer.weight.quant_state.nested and layer.weight.quant_type == "nf4"
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        assert trained == {torch.bfloat16 if name == "bound" or "bf16" in name else torch.float32}


def test_the_bars_are_those_of_the_claim(qlora):
    rows = {name: qlora.Row(ms=10, peak=30) for name in ROWS}
    rows["lightning_lora, NF4"] = qlora.Row(ms=11, peak=22)
    lines = qlora.bars(rows, qlora.LONG, "qv")
    assert lines[0] == "Bar: lightning_lora, NF4, time over that in bf16: at most 1.08. Measured 1.100: MISSED."
    assert lines[1] == "Bar: lightning_lora, NF4, peak GiB: at most 22.5. Measured 22.000: met."
    assert [line.endswith("met.") for line in lines[2:]] == [False, True, False, True]
    assert len(qlora.bars(rows, qlora.SHORT, "qv")) == len(qlora.bars(rows, qlora.LONG, "all")) == 4


@pytest.mark.slow
def test_a_row_whose_model_cannot_be_made_leaves_the_others(qlora):
    def broken() -> nn.Module:
        raise ValueError("no such model")

    makes = {"broken": broken, "bound": qlora.models(["q_proj"], 2, "tiny")["bound"]}
    for rows in qlora.rows_of(makes, qlora.Settings(tiny=True)).values():
        assert rows["broken"].failure == "ValueError: no such model" and math.isnan(rows["broken"].ms)
        assert rows["bound"].ms > 0


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits_and_merges_to_the_sum(tmp_path):
    done = run_script(BENCHMARKS / "qlora_resume.py", "--tiny", "--out", tmp_path / "resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / f"resume_{datetime.date.today()}.md").read_text()
    assert "resumed after step 20: the same bits" in text and "Losses of these 30 steps: the same bits" in text
    in_fp32, in_bf16, of_adapted = map(float, re.findall(r"(?:fp32|bf16): ([\d.e+-]+)[;.] (?:both|Of)", text))
    assert in_fp32 < 1e-4 and in_bf16 < 2**-8 and of_adapted < 2**-6
