"""The benchmark of merges of a 4-bit base, on a tiny model: every row, and that nothing is left on the model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def qlora_merge(monkeypatch) -> ModuleType:
    for folder in (EXAMPLES, EXAMPLES / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module("qlora_merge")


def tiny(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
def test_every_merge_is_measured_against_the_model_as_trained(qlora_merge, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(qlora_merge, "load_base", tiny)
    np.save(tmp_path / "novel_1.npy", np.random.default_rng(0).integers(0, 32, 4000, dtype=np.uint16))
    path = tmp_path / "out.jsonl"
    assert qlora_merge.main(["--data", str(tmp_path), "--steps", "3", "--seeds", "2", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    first, second = map(json.loads, path.read_text().splitlines())
    trained, dequantized, bf16, nf4, original, *_ = first["losses"].values()
    assert len(first["losses"]) == 7 and len(trained) == len(nf4)
    torch.testing.assert_close(torch.tensor(dequantized), torch.tensor(trained), rtol=0, atol=2e-4)
    assert original != trained != nf4 != dequantized and bf16 != nf4
    assert first["base_loss"] == second["base_loss"] != first["plain_loss"] and first["losses"] != second["losses"]
    assert qlora_merge.main(["--report", str(path)]) == 0
    table = capsys.readouterr().out
    assert table in printed and table.count("±") == 6
