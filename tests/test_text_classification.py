"""The text classification example, its parts: no network, a tiny random encoder, a handful of made-up sentences."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = {
    "fresh": ["fine", "moving", "clever", "bright"],
    "rotten": ["dull", "hollow", "tired", "clumsy"],
    "": ["a", "film", "of", "scenes", "and", "actors", "with", "music", "that", "lasts"],
}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    # What the example sets for its own process must not outlive the test: the seed, and the filter on the log.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "filters", [])
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*treespec.*")
    import text_classification

    return text_classification


@pytest.fixture
def encoder(tmp_path) -> str:
    """A folder with a BERT of a few thousand weights and a tokenizer of whole words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def movies(number: int = 40, each: int = 12) -> list[list[tuple[str, int]]]:
    draw = random.Random(0)

    def review(label: str) -> str:
        words = draw.choices(WORDS[""], k=draw.randint(3, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(WORDS[label]))
        return " ".join(words)

    labels = ["rotten", "fresh"]
    return [[(review(labels[index % 2]), index % 2) for index in range(each)] for _ in range(number)]


def test_the_parts_do_not_share_a_movie(example, encoder):
    titled = [[(f"film {number} scenes", number % 2)] * 3 for number in range(40)]
    data = example.Reviews(encoder, titled)
    parts = [{text for text, _ in part} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [30, 2, 8]
    assert len(set.union(*parts)) == 40


def test_batches_hold_every_review_once_and_little_padding(example, encoder):
    data = example.Reviews(encoder, movies())
    batches = list(data.train_dataloader())
    assert sum(len(labels) for _, labels in batches) == len(data.train)
    assert len(batches) == len(data.train_dataloader())
    assert torch.cat([texts["attention_mask"].flatten() for texts, _ in batches]).float().mean() > 0.75


@pytest.mark.slow
def test_three_ways_of_one_module(example, encoder, tmp_path):
    data = example.Reviews(encoder, movies())
    runs, models = {}, {}
    for way in example.WAYS:
        runs[way], models[way] = example.run(way, encoder, data, 24, 0, tmp_path / way)

    probe, lora, full = (runs[way] for way in example.WAYS)
    plain = example.ReviewClassifier(encoder)
    assert probe.trained == 2 * 16 + 2
    assert lora.trained == probe.trained + 2 * 4 * 8 * (16 + 16), "r=8 on four projections of each of two layers"
    assert full.trained == sum(parameter.numel() for parameter in plain.parameters())
    assert lora.merged == pytest.approx(lora.accuracy, abs=0.01), "the merged module reads as the adapted one did"
    assert models[example.LORA].state_dict().keys() == plain.state_dict().keys()
    assert [step for step, _ in lora.curve] == [step for step, _ in full.curve] == list(range(3, 25, 3))

    table = example.report({way: [run] for way, run in runs.items()})
    assert f"{full.trained:,}" in table and "LoRA, merged" in table
    assert "+-" in example.report({way: [run, run] for way, run in runs.items()})
    assert example.some_predictions(models[example.LORA], data).count("\n") == 4
    example.draw({way: [run] for way, run in runs.items()}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


@pytest.mark.slow
def test_the_command(example, encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "rotten_tomatoes", movies)
    arguments = ["--full", "--steps", "8", "--model", encoder, "--out", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *arguments])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:-1]] == [
        "frozen encoder, linear probe",
        "LoRA",
        "LoRA, merged, a plain module",
        "full fine-tuning",
    ]
    assert all("+-" in line for line in lines[-5:-1])
    assert (tmp_path / "picture.png").exists()


METHODS = [
    "lora",
    "bias",
    "norm",
    "head",
    "full",
    "houlsby",
    "pfeiffer",
    "parallel",
    "block",
    "prefix",
    "prompt",
    "deep_prompt",
    "subspace",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "fusion"])
def test_any_method_by_one_flag(example, encoder, tmp_path, monkeypatch, capsys, method):
    assert list(example.METHODS) == METHODS
    monkeypatch.setattr(example, "rotten_tomatoes", movies)
    arguments = ["--method", method, "--steps", "8", "--model", encoder, "--out", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *arguments])
    example.main()
    table = capsys.readouterr().out.splitlines()[-3:]
    rows = [method, f"{method}, merged, a plain module"] if method in ("lora", "subspace") else [method]
    assert [line.split("  ")[0] for line in table[-len(rows) :]] == rows
    assert not (tmp_path / "picture.png").exists()
