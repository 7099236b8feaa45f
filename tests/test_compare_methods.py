"""The comparison of methods, its parts: budgets, a run on a tiny encoder, and a report of made-up results."""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import adapt

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, quiet_transformers):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    import compare_methods

    return compare_methods


@pytest.fixture
def reports(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import compare_report

    return compare_report


def bert(**sizes: int) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=64, **sizes))


class Classifier(nn.Module):
    """A BERT of the width of all-MiniLM-L6-v2 and few words, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.head = nn.Linear(384, 2)


BUDGETS = {
    "LoRA, r=8 on q and v": 73_728,
    "prefix of 16": 73_728,
    "bottlenecks of 8, Houlsby": 78_432,
    "bottlenecks of 16, Pfeiffer": 76_128,
    "deep prompt of 32": 73_728,
    "random subspace": 73_728,
    "biases (BitFit)": 25_728,
    "norms": 9_984,
    "prompt of 16 at the input": 6_144,
    "head alone (linear probe)": 0,
}


@pytest.mark.slow
def test_the_budget_of_each_method(example):
    assert [*BUDGETS, "full fine-tuning"] == list(example.METHODS)
    for method, expected in BUDGETS.items():
        model = Classifier()
        adapt(model, example.METHODS[method].callback().config)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trained - 770 == expected, method


def test_rates_are_a_factor_of_three_apart(example):
    assert [example.sweep_rate(3e-3, exponent) for exponent in (-2, -1, 0, 1, 2)] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    swept = [example.sweep(method, True, None) for method in example.METHODS]
    assert [setting.rate for setting in swept[0]] == [3e-3, 1e-3, 1e-2, 3e-4, 3e-2]
    assert {(len(tried), *{setting.seed for setting in tried}) for tried in swept} == {(5, 0)}


def test_the_best_rate_is_repeated_by_other_seeds(example):
    tried = example.sweep("norms", True, 9)
    losses = {3e-3: 0.5, 1e-3: 0.4, 1e-2: math.nan}  # two rates were not run
    records = [
        {**vars(setting), "validation_loss": losses[setting.rate]} for setting in tried if setting.rate in losses
    ]
    assert example.repeats(tried, records) == [example.Setting("norms", 1e-3, seed, 9) for seed in (1, 2, 3, 4)]
    assert example.repeats(tried, []) == []


def test_a_study_makes_its_sweeps_and_then_its_repeats_seed_by_seed(example, tmp_path):
    made = []

    def run_one(setting):
        made.append((setting.method, setting.seed))
        return {"validation_loss": abs(math.log(setting.rate / 3e-3))}

    storage = example.Storage(tmp_path / "results.jsonl")
    swept = [example.sweep(method, True, 9) for method in ("norms", example.LORA)]
    example.make_runs(swept, run_one, storage, full=True)
    assert made[:10] == [("norms", 0)] * 5 + [(example.LORA, 0)] * 5
    assert made[10:] == [(method, seed) for seed in (1, 2, 3, 4) for method in ("norms", example.LORA)]
    assert {record["rate"] for record in storage.read() if record["seed"]} == {3e-3}


@pytest.fixture
def prepared(tmp_path) -> Path:
    """What ``prepare`` writes, of a tiny encoder and random reviews whose first token tells the label."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert(**sizes).half().save_pretrained(tmp_path)
    tensors = {}
    for part, number in (("train", 64), ("validation", 16), ("test", 24)):
        labels = torch.arange(number) % 2
        tokens = torch.randint(5, 50, (number, 12))
        tokens[:, 0] = 1 + labels
        fields = {
            "tokens": tokens.short(),
            "lengths": torch.arange(number).clamp(3, 12).short(),
            "labels": labels.byte(),
        }
        tensors |= {f"{part}.{name}": value.contiguous() for name, value in fields.items()}
    save_file(tensors, tmp_path / "reviews.safetensors")
    return tmp_path


def test_batches_are_padded_to_their_longest_review(example, prepared):
    data = example.Batches(prepared, torch.device("cpu"), share=2, size=8)
    batches = data.training(seed=0, steps=20)
    assert len(batches) == 20 and all(len(labels) == 8 for _, labels in batches)
    assert all(int(texts["attention_mask"].sum(1).max()) == texts["input_ids"].shape[1] for texts, _ in batches)
    assert sum(len(labels) for _, labels in data.evaluation("test")) == 12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA, r=8 on q and v", "head alone (linear probe)"])
def test_one_run(example, prepared, method):
    data = example.Batches(prepared, torch.device("cpu"), share=1, size=8)
    result = example.run(example.Setting(method, 1e-2, 0, 16), prepared, data, torch.device("cpu"))
    assert result["trained"] == (2 * 8 * 32 if method.startswith("LoRA") else 0)
    assert len(result["test_losses"]) == 24
    assert sum(result["test_losses"]) / 24 < math.log(2), "it learns"


def made_up(gains: dict[str, float], seeds: int = 3, rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)) -> list[dict]:
    """Results in which a method's loss is lower by its gain, at the middle rate."""
    draw = random.Random(0)
    reviews = [draw.gauss(0.6, 0.3) for _ in range(500)]
    return [
        {
            "method": method,
            "rate": rate,
            "seed": seed,
            "trained": 73_728,
            "machine": "CPU",
            "validation_loss": 0.5 - gain + 0.1 * (rate != rates[len(rates) // 2]),
            "test_losses": [loss - gain + draw.gauss(0, 0.02) for loss in reviews],
        }
        for seed in range(seeds)
        for method, gain in gains.items()
        for rate in rates
    ]


GAINS = {"LoRA, r=8 on q and v": 0.1, "same": 0.1, "lower": 0.2, "higher": 0.0}


@pytest.mark.slow
def test_the_report_says_what_is_noise(reports, tmp_path, capsys):
    reports.report(made_up(GAINS), tmp_path / "result.md", tmp_path / "result.png")
    text = (tmp_path / "result.md").read_text()
    assert "By test loss equal to LoRA within noise: same; better: lower; worse: higher." in text
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert rows["same"][2:4] == ["0.003", "2"] and rows["same"][5].startswith("(")
    assert rows["lower"][5].startswith("-0.0998 ± 0.00") and "±" in rows["lower"][4]
    assert text.startswith("CPU\n") and (tmp_path / "result.png").stat().st_size > 20_000
    assert text.split("\n\n", 1)[1].strip() in capsys.readouterr().out


def test_a_diverged_rate_is_not_chosen_and_an_end_of_the_sweep_is_named(reports):
    records = made_up(GAINS)
    for record in records:
        if record["method"] == "same" and record["rate"] == 3e-3:
            record["validation_loss"] = math.nan
    rows = [reports.best(sweep) for sweep in reports.sweeps(records).values()]
    assert [row.rate for row in rows] == [3e-3, 1e-3, 3e-3, 3e-3]
    assert "| 0.001 (end of the sweep) |" in reports.table(rows)


def test_the_seed_that_chooses_the_rate_is_not_reported(reports):
    records = made_up(GAINS)
    repeated = [record for record in records if record["rate"] == 3e-3 or record["seed"] == 0]
    for record in repeated:
        if record["seed"] > 0 and record["method"] == "same":
            record["validation_loss"] = 9.0
    row = reports.best(reports.sweeps(repeated)["same"])
    assert row.rate == 3e-3 and sorted(row.runs) == [1, 2]


def test_without_other_seeds_the_one_that_chooses_is_reported(reports):
    row = reports.best(reports.sweeps(made_up(GAINS, seeds=1))["same"])
    assert row.rate == 3e-3 and sorted(row.runs) == [0]


def test_of_a_method_with_fewer_seeds_nothing_is_said(reports):
    records = [record for record in made_up(GAINS) if record["method"] != "lower" or record["seed"] < 2]
    rows = [reports.best(sweep) for sweep in reports.sweeps(records).values()]
    assert "better: none; worse: higher." in reports.statement(rows)
    assert reports.statement(rows).endswith("Fewer seeds than LoRA, so no statement: lower.")
    [line] = [line for line in reports.table(rows).splitlines() if line.startswith("| lower")]
    assert line.count("±") == 0 and " | 1 | " in line


def test_accuracy_counts_the_losses_under_the_logarithm_of_two(reports):
    row = reports.Row("any", 1.0, {0: {"test_losses": [0.1, 0.69, 0.7, 2.0]}})
    assert row.hits([0]) == [[100.0, 100.0, 0.0, 0.0]]


def test_the_record_has_the_means_of_its_runs(reports):
    path = EXAMPLES / "benchmarks" / "compare_methods_2026-11-29.md"
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")][1:]
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    chosen = {name: reports.best(sweep) for name, sweep in reports.sweeps(records).items()}
    assert len(rows) == len(chosen) == 11
    for method, trained, rate, seeds, loss, *_, accuracy, _ in (row if len(row) == 8 else [*row, ""] for row in rows):
        runs = chosen[method].runs.values()
        assert (f"{chosen[method].rate:g}", str(len(runs))) == (rate, seeds)
        assert {f"{run['trained']:,}" for run in runs} == {trained}
        assert float(loss.split(" ±")[0]) == pytest.approx(statistics.fmean(run["test_loss"] for run in runs), abs=6e-5)
        assert float(accuracy.split(" ±")[0]) == pytest.approx(
            statistics.fmean(run["accuracy"] for run in runs), abs=6e-3
        )
