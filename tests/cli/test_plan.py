"""Plans from configurations, headers and sizes."""

from __future__ import annotations

import json

import pytest

from lightning_lora import LoRAConfig, plan_lora
from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.plan import plan_files
from lightning_lora.cli.shapes import Transformer
from tests.helpers.on_disk import base_tensors, values, write_base

CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 20, "rms_norm_eps": 1e-6, "num_attention_heads": 2}


def test_from_headers(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    for source in (base, base / "model-00001-of-00002.safetensors"):
        assert plan_files(source, 4, ["q_proj"]).costs.trainable in (4 * 16, 2 * 4 * 16)
    assert plan_files(base, 4, "qv").costs.trainable == 2 * 4 * (8 + 8 + 8 + 4)
    found = plan_files(base, 4, ["layers.0.*"])
    assert found.costs.trainable == 4 * (8 + 8 + 8 + 4 + 8 + 12 + 12 + 8)
    assert found.costs.base == sum(value.numel() for value in base_tensors().values())


def test_from_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for source in (tmp_path, tmp_path / "config.json"):
        assert plan_files(source, 2, "qv").costs.trainable == 2 * 2 * 2 * (8 + 8)


@pytest.mark.parametrize("targets", ["attn", "qv", "mlp", "all"])
def test_from_sizes(targets):
    sizes = Transformer(hidden=8, layers=3, vocab=20)
    expected = plan_lora(skeleton(sizes.shapes()), LoRAConfig(r=2, targets=targets))
    assert plan_files(sizes, 2, targets).costs.trainable == sum(row.parameters for row in expected.rows)


def test_slices_of_a_fused_map_have_pairs_of_their_own():
    fused = Transformer(hidden=8, layers=1, vocab=20, fused=True)
    assert plan_files(fused, 2, "qv").costs.trainable == 2 * 2 * (8 + 8)
    assert plan_files(fused, 2, "attn").costs.trainable == 2 * (8 + 24) + 2 * (8 + 8)


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plan_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither a config\.json nor a safetensors file"):
        plan_files(tmp_path)
    base = write_base(tmp_path / "base", {"a.weight": values(2, 2)})
    with pytest.raises(ValueError, match="found no attention block"):
        plan_files(base, targets="attn")
