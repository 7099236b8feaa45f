"""Plans from headers; those from configurations are in test_config_model."""

from __future__ import annotations

import pytest

from lightning_lora.cli.plan import plan_files
from tests.helpers.on_disk import base_tensors, values, write_base


def test_from_headers(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    for source in (base, base / "model-00001-of-00002.safetensors"):
        assert plan_files(source, 4, ["q_proj"]).costs.trainable in (4 * 16, 2 * 4 * 16)
    assert plan_files(base, 4, "qv").costs.trainable == 2 * 4 * (8 + 8 + 8 + 4)
    planned = plan_files(base, 4, ["layers.0.*"])
    assert planned.costs.trainable == 4 * (8 + 8 + 8 + 4 + 8 + 12 + 12 + 8)
    assert planned.costs.base == sum(value.numel() for value in base_tensors().values())
    assert planned.model == ""


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plan_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither a config\.json nor a safetensors file"):
        plan_files(tmp_path)
    base = write_base(tmp_path / "base", {"a.weight": values(2, 2)})
    with pytest.raises(ValueError, match="found no attention block"):
        plan_files(base, targets="attn")
