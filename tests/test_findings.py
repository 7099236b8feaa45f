"""The studies on a language model, their parts: runs of a tiny Llama, and reports of made-up results."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"


def record_of(name: str) -> tuple[str, list[dict]]:
    """The text of a committed record, and the results of its runs."""
    path = BENCHMARKS / f"{name}_2026-11-29.md"
    return path.read_text(), [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


@pytest.fixture
def austen(monkeypatch, quiet_transformers):
    monkeypatch.syspath_prepend(EXAMPLES)
    import austen_runs

    monkeypatch.setattr(austen_runs, "load_base", lambda folder: llama())
    monkeypatch.setattr(austen_runs, "ON_CPU", austen_runs.Sizes(batch=4, window=8, held_out=6))
    return austen_runs


def wide_llama() -> torch.nn.Module:
    """With rows of a multiple of 64, the block of NF4."""
    return llama(width=192, inner=64)


@pytest.fixture
def findings(austen, monkeypatch):
    import findings
    import findings_report

    monkeypatch.setattr(findings_report, "load_base", austen.load_base)
    return findings


@pytest.fixture
def rate_and_rank(austen):
    import rate_and_rank

    return rate_and_rank


def llama(width: int = 96, inner: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=20))


@pytest.fixture
def qlora_accuracy(austen, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    monkeypatch.setattr(austen, "load_base", lambda folder: wide_llama())
    import qlora_accuracy

    return qlora_accuracy


@pytest.fixture
def novels(tmp_path) -> Path:
    for number in (1, 2):
        np.save(tmp_path / f"novel_{number}.npy", (np.arange(600) * number % 20).astype(np.uint16))
    return tmp_path


@pytest.mark.slow
def test_a_run_learns_and_leaves_the_base_as_it_was(austen, novels):
    study = austen.Study(novels, novels / "adapters")
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    setting = austen.Setting("qv", r=2, alpha=16, rate=1e-2, seed=0, steps=30)
    result = study.run(setting, keep=True)
    assert result["loss"] < result["base_loss"] - 0.1 and len(result["losses"]) == 6
    assert result["trained"] == 2 * 2 * (2 * 96 + 96 + 32)
    after = study.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert study.run(setting) == result, "a run depends on its setting alone"
    assert (novels / "adapters" / austen.adapter_file(setting)).exists()


def test_no_window_is_trained_on_and_held_out(austen, novels):
    study = austen.Study(novels)
    assert len(study.train) == 2 * 570, "the last twentieth of each novel is held out"
    assert study.held_out.shape == (6, 8) and int(study.held_out[0, 0]) == 570 % 20


def test_the_rate_rises_and_falls(austen):
    setting = austen.Setting("qv", 2, 16, 1e-3, 0, steps=100)
    factors = [setting.factor(step) for step in range(100)]
    assert max(factors) == factors[4] > 0.95 and factors[0] < 0.25 and 0 < factors[-1] < 0.02


def test_the_budget_is_the_same_for_every_choice_of_matrices(findings):
    features = {"q": 576 + 576, "k": 576 + 192, "v": 576 + 192, "o": 576 + 576}
    numbers = [30 * r * sum(features[letter] for letter in targets) for targets, r in findings.SAME_BUDGET.items()]
    assert set(numbers) == {345_600}


def made_up(findings, diverged: float | None = None) -> list[dict]:
    """Results in which a higher rank is a little better than r=8 or the same, and q alone is worse."""
    draw = random.Random(0)
    windows = [draw.gauss(3.0, 0.4) for _ in range(50)]
    records = []
    for targets, r in findings.choices(full=True):
        loss = {"q": 0.2, "k": 0.3}.get(targets, 0.0) + (0.05 if r == 1 else 0.0)
        for setting in findings.sweep((targets, r), True, None):
            worse = 0.1 * (setting.rate != 3e-3)
            mean = math.nan if setting.rate == diverged else 3.0 + loss + worse
            for seed in (0, *findings.SEEDS) if setting.rate != diverged else (0,):
                losses = [window + loss + worse + draw.gauss(0, 0.01) for window in windows]
                names = {"targets": targets, "r": r, "alpha": 16, "rate": setting.rate, "seed": seed, "steps": 300}
                records.append({**names, "loss": mean, "losses": losses, "trained": 345_600, "base_loss": 3.5})
    return records


@pytest.mark.slow
def test_tables_of_matrices_and_ranks(findings):
    records = made_up(findings)
    rows = [findings.row_of(choice, records, True, None) for choice in findings.SAME_BUDGET.items()]
    assert [list(row.runs) for row in rows] == [[1, 2]] * 7, "the seed of the sweep is not reported"
    table = findings.table_5(rows).splitlines()
    assert table[2].startswith("| q | 10 | 345,600 | 0.003 | 3.2") and "+0.1999 ± 0.00" in table[2]
    assert table[2].endswith("70.4, 91.0 |")
    ranks = [findings.row_of(("qv", r), records, True, None) for r in findings.RANKS]
    table = findings.table_6(ranks).splitlines()
    assert "| +0.0" in table[2] and "(" in table[-1] and table[-1].endswith("73.5, 91.4 |")


def test_of_a_study_that_was_cut_the_tables_say_so(findings):
    records = [record for record in made_up(findings) if record["rate"] == 1e-3 and record["seed"] == 0]
    rows = [findings.row_of(("qv", r), records, True, None) for r in findings.RANKS]
    assert [list(row.runs) for row in rows] == [[0]] * 5
    assert all("| 0.001 (1 of 3 rates) |" in line for line in findings.table_6(rows).splitlines()[2:])
    assert findings.row_of(("qv", 8), [], True, None) is None
    assert findings.kept(True, None, records) is None
    by_rate = findings.losses_by_rate("qv", records, True, None)
    assert list(by_rate) == [1e-3] and list(by_rate[1e-3]) == [1, 2, 4, 6, 8, 64]
    assert (
        findings.table_of_rates("q, v", by_rate).splitlines()[0]
        == "| q, v, one seed | r=1 | r=2 | r=4 | r=6 | r=8 | r=64 |"
    )


def test_a_rate_that_diverged_is_not_chosen(findings):
    row = findings.row_of(("qv", 8), made_up(findings, diverged=3e-3), True, None)
    assert row.setting.rate != 3e-3


@pytest.mark.slow
def test_a_whole_study_of_a_tiny_model(findings, austen, novels, monkeypatch, tmp_path):
    monkeypatch.setattr(findings, "data_folder", lambda folder: novels)
    folder = ["--out", str(tmp_path / "findings.jsonl"), "--adapters", str(tmp_path / "adapters"), "--steps", "3"]
    findings.main(folder)
    lines = (tmp_path / "findings.jsonl").read_text().count("\n")
    assert lines == 7
    findings.main([*folder, "--report", str(tmp_path / "result.md")])
    assert (tmp_path / "findings.jsonl").read_text().count("\n") == lines
    text = (tmp_path / "result.md").read_text()
    assert "query of block 1 of 2 | 8 |" in text and "paper: query of block 48 of 96 | 64 | 1.90 | 37.71" in text
    assert "r=8 and r=64" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"result_losses.png", "result_subspaces.png"}


@pytest.mark.slow
def test_losses_over_rates(rate_and_rank, tmp_path):
    panels = rate_and_rank.settings(True, None)
    assert [len(panel) for panel in panels.values()] == [24, 24]
    records = [
        {
            **vars(setting),
            "loss": math.nan if setting.rate == 3e-2 else 3 + abs(math.log(setting.rate / 1e-3)),
            "base_loss": 4,
        }
        for panel in panels.values()
        for setting in panel
    ]
    found = {title: rate_and_rank.losses(panel, records) for title, panel in panels.items()}
    table = rate_and_rank.table(found).splitlines()
    assert len(table) == 10 and all("| **3.0000** |" in row and row.endswith("inf |") for row in table[2:])
    rate_and_rank.draw(found, 4.0, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


@pytest.mark.slow
def test_the_record_of_the_findings_has_the_tables_of_its_runs(findings):
    text, records = record_of("findings")
    rows = {choice: findings.row_of(choice, records, True, None) for choice in findings.choices(full=True)}
    assert findings.table_5([rows[choice] for choice in findings.SAME_BUDGET.items()]) in text
    assert findings.table_6([rows[targets, r] for targets in ("qv", "qkvo") for r in findings.RANKS]) in text
    for targets in ("qv", "qkvo"):
        by_rate = findings.losses_by_rate(targets, records, True, None)
        assert findings.table_of_rates(", ".join(targets), by_rate) in text
    missing = [setting for choice in rows for setting in findings.sweep(choice, True, None)]
    assert len(findings.of_settings(missing, records)) == len(missing), "the sweeps are whole"


def test_the_record_of_rates_has_the_table_of_its_runs(rate_and_rank):
    text, records = record_of("rate_and_rank")
    panels = rate_and_rank.settings(True, None)
    assert rate_and_rank.table({title: rate_and_rank.losses(panel, records) for title, panel in panels.items()}) in text


def test_the_record_of_a_4_bit_base_has_the_table_of_its_runs(qlora_accuracy):
    text, records = record_of("qlora_accuracy")
    assert len(qlora_accuracy.of_settings(qlora_accuracy.settings(True, None), records)) == len(records) == 6
    assert qlora_accuracy.table(records) in text and qlora_accuracy.statement(records) in text


def test_a_base_in_nf4_keeps_its_head_and_embeddings_and_about_the_same_outputs(qlora_accuracy):
    model, tokens = wide_llama(), torch.arange(8)[None]
    expected = model(tokens).logits
    rounded = qlora_accuracy.in_four_bits(wide_llama())
    assert [type(layer) for layer in (rounded.lm_head, rounded.model.embed_tokens)] == [
        torch.nn.Linear,
        torch.nn.Embedding,
    ]
    packed = [layer for layer in rounded.modules() if type(layer).__name__ == "Linear4bit"]
    assert len(packed) == 2 * 7 and all(layer.weight.quant_state.nested for layer in packed)
    error = (rounded.train()(tokens).logits - expected).norm() / expected.norm()
    assert 0 < error < 0.3


@pytest.mark.slow
def test_both_bases_learn_and_the_study_keeps_its_own(qlora_accuracy, austen, novels):
    study = austen.Study(novels)
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    runs = {}
    for base in (qlora_accuracy.FULL_PRECISION, qlora_accuracy.NF4):
        setting = qlora_accuracy.Setting("qv", 2, 16, 1e-2, 0, 30, base)
        runs[base] = qlora_accuracy.run(study, setting)
        assert runs[base]["loss"] < runs[base]["base_loss"] - 0.1
    assert runs[qlora_accuracy.NF4]["base_bytes"] < runs[qlora_accuracy.FULL_PRECISION]["base_bytes"]
    after = study.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
