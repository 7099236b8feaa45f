"""Studies of many runs: files that are continued, and differences that are noise or not."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import recorded_runs

    return recorded_runs


@pytest.fixture
def paired(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import paired

    return paired


@dataclass(frozen=True)
class Setting:
    r: int
    seed: int


SETTINGS = [Setting(r, seed) for seed in (0, 1) for r in (2, 4)]


def test_a_cut_study_makes_only_what_is_missing(runs, tmp_path):
    first, second = (runs.Storage(tmp_path / name) for name in ("first.jsonl", "second.jsonl"))
    runs.run_missing(SETTINGS[:3], lambda setting: {"loss": setting.r}, first)
    text = first.out.read_text()
    first.out.write_text(text[:-20])  # the third line was being written
    made = []
    continued = runs.Storage(second.out, done=(first.out,))
    runs.run_missing(SETTINGS, lambda setting: made.append(setting) or {"loss": setting.r}, continued)
    assert made == SETTINGS[2:]
    records = runs.of_settings(SETTINGS, continued.read())
    assert [(record["r"], record["seed"], record["loss"]) for record in records] == [
        (2, 0, 2),
        (4, 0, 4),
        (2, 1, 2),
        (4, 1, 4),
    ]
    assert "torch" in runs.machines(records)


def test_a_run_that_fails_does_not_cost_the_others(runs, tmp_path, capsys):
    storage = runs.Storage(tmp_path / "results.jsonl")

    def run(setting: Setting) -> dict:
        if setting == SETTINGS[1]:
            raise ValueError("no such kernel")
        return {}

    with pytest.raises(RuntimeError, match="1 of 4 runs failed"):
        runs.run_missing(SETTINGS, run, storage)
    assert len(storage.read()) == 3
    assert "no such kernel" in capsys.readouterr().err


def test_processes_share_the_runs(runs, tmp_path):
    parts = [runs.Storage(tmp_path / "results.jsonl", part=(index, 3)).mine(SETTINGS) for index in range(3)]
    assert sorted((setting for part in parts for setting in part), key=SETTINGS.index) == SETTINGS and all(parts)


def test_a_difference_is_paired(paired):
    """Hard and easy items cancel out: the error is that of the differences, and much smaller than that of the items."""
    draw = random.Random(0)
    items = [[draw.gauss(0, 10) for _ in range(400)] for _ in range(3)]
    other = [[value + 0.5 + draw.gauss(0, 1) for value in seed] for seed in items]
    found = paired.difference(other, items)
    flat = [
        ours - theirs for seed, base in zip(other, items, strict=True) for ours, theirs in zip(seed, base, strict=True)
    ]
    assert found.mean == pytest.approx(statistics.fmean(flat))
    by_item = [
        statistics.fmean(ours[i] - theirs[i] for ours, theirs in zip(other, items, strict=True)) for i in range(400)
    ]
    by_seed = [statistics.fmean(a - b for a, b in zip(*pair, strict=True)) for pair in zip(other, items, strict=True)]
    expected = math.hypot(statistics.stdev(by_item) / 20, statistics.stdev(by_seed) / math.sqrt(3))
    assert found.error == pytest.approx(expected)
    assert not found.is_noise and paired.difference(items, items).is_noise


def test_seeds_that_disagree_are_noise_however_many_items_there_are(paired):
    first = [[1.0] * 10_000, [0.0] * 10_000]
    second = [[0.0] * 10_000, [0.9] * 10_000]
    assert paired.difference(first, second).is_noise


@pytest.mark.parametrize(("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ("abc", "a, b and c")])
def test_names(paired, words, text):
    assert paired.names(words) == text
