"""Every example runs as its first lines say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.helpers.scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")


def run(folder: Path, script: str, *arguments: object) -> str:
    done = run_script(EXAMPLES / script, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def accuracy(text: str, row: str) -> float:
    return float(re.search(rf"{row} +([\d.]+)", text)[1])


@pytest.mark.slow
def test_flipped_digits(tmp_path):
    text = run(tmp_path, "flipped_digits.py", "--out", tmp_path / "picture.png")
    plain, before = accuracy(text, "MNIST, the plain model"), accuracy(text, "flipped digits, the plain model")
    after, merged = (
        accuracy(text, "flipped digits, with the adapters"),
        accuracy(text, "flipped digits, adapters merged"),
    )
    assert plain > 91 and before < plain - 2.5, "the mirrored digits are missed"
    assert after > before + 2 and merged == pytest.approx(after, abs=0.11)
    assert accuracy(text, "MNIST, adapters merged") > plain - 2, "little of MNIST is forgotten"
    assert "235,146     6,248" in text
    assert (tmp_path / "picture.png").stat().st_size > 50_000


def test_the_recorded_accuracies_of_the_flipped_digits_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("flipped_digits")
    record = (EXAMPLES / example.RECORD).read_text()
    of_5000, of_all = record[record.index("## 5,000 digits") :], record[: record.index("## 5,000 digits")]
    assert example.RECORDED[True].keys() == example.RECORDED[False].keys()
    for full, text in ((True, of_all), (False, of_5000)):
        for value in example.RECORDED[full].values():
            assert f"| {value:.2f} " in text


@pytest.mark.slow
def test_the_command_line(tmp_path):
    config = EXAMPLES / "config.yaml"
    quick = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    run(tmp_path, "cli.py", "fit", "--data.flip", "false", "--trainer.default_root_dir", "runs/base", *quick)
    text = run(tmp_path, "cli.py", "fit", "--config", config, "--model.base", "runs/base", *quick)
    assert "6,248 trainable parameters, 2.66% of the base's 235,146" in text
    adapter = ["--model.base", "runs/base", "--ckpt_path", "runs/lora/last.ckpt"]
    text = run(tmp_path, "cli.py", "test", "--config", config, *adapter, *quick)
    assert float(re.search(r"accuracy\s+│\s+([\d.]+)", text)[1]) > 0.7


@pytest.mark.slow
def test_peft_both_ways(tmp_path):
    pytest.importorskip("peft")
    text = run(tmp_path, "peft_both_ways.py")
    base, merged = (float(re.search(rf"loss of the {what} ([\d.]+)", text)[1]) for what in ("base", "merged module"))
    assert base > 5 and merged < 0.1
    assert all(float(number) < 1e-4 for number in re.findall(r"by at most (\S+)", text))
    assert len(re.findall(r"by at most", text)) == 2
    assert float(re.search(r"after two more epochs ([\d.]+)", text)[1]) < 0.1


@pytest.mark.slow
def test_several_adapters(tmp_path):
    text = run(tmp_path, "several_adapters.py", "--out", tmp_path / "picture.png")
    rows = {
        line.split("  ")[0]: [float(number) for number in re.findall(r"[\d.]+", line)]
        for line in text.splitlines()
        if line.startswith(("as written", "mirrored", "turned", "swapped"))
    }
    assert rows["as written"][0] > 91
    for index, task in enumerate(("mirrored", "turned", "swapped"), 1):
        assert rows[task][0] < 50 and rows[task][index] > 85, "the base fails, its own adapter reads them"
        assert max(rows[task]) == rows[task][index]
    without, routed = map(float, re.search(r"mixed in one batch +([\d.]+) %.*\n +([\d.]+) %", text).groups())
    assert without < 35 and routed > 85
    assert (tmp_path / "picture.png").stat().st_size > 40_000
