"""PEFT directories: what they hold, and what is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_lora.peft_format.stored import config_of, is_adapter, open_adapter
from tests.helpers.on_disk import PREFIX, attention_pairs, pair, values, write_adapter


def test_pairs_with_scales(tmp_path):
    adapter = open_adapter(write_adapter(tmp_path / "a", attention_pairs(), {"score.weight": values(2, 8)}))
    assert adapter.pairs.keys() == attention_pairs().keys()
    assert list(adapter.in_full) == ["score.weight"]
    found = adapter.pairs["model.layers.1.self_attn.v_proj"]
    assert (found.r, found.scale, found.features(), found.embedding) == (3, 2.0, (8, 4), False)
    A, B = attention_pairs()[found.name]
    left, right = found.read(torch.float32)
    assert torch.equal(left, 2 * B) and torch.equal(right, A)


def test_a_file_alone_has_no_scale(tmp_path):
    folder = write_adapter(tmp_path / "a", attention_pairs())
    (folder / "adapter_config.json").unlink()
    adapter = open_adapter(folder / "adapter_model.safetensors")
    assert {found.scale for found in adapter.pairs.values()} == {None}
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json in its folder"):
        config_of(adapter)
    with pytest.raises(FileNotFoundError, match="so it is no PEFT directory"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"model.q.lora_A.weight": values(3, 8)}, "names begin with 'base_model.model.'"),
        ({f"{PREFIX}q.weight": values(3, 8)}, "no tensors that are called lora_A"),
        ({f"{PREFIX}q.lora_A.weight": values(3, 8)}, "`q` needs one A and one B, but .* has lora_A.weight"),
        (
            {f"{PREFIX}q.lora_A.weight": values(3, 8), f"{PREFIX}q.lora_B.weight": values(8, 4)},
            "no A \\(r, in\\) and B",
        ),
        ({f"{PREFIX}q.lora_A.weight": values(3), f"{PREFIX}q.lora_B.weight": values(8, 3)}, "no A \\(r, in\\) and B"),
        (
            {f"{PREFIX}q.lora_A.weight": values(3, 8).int(), f"{PREFIX}q.lora_B.weight": values(8, 3)},
            "of I32 and B of F32",
        ),
        ({f"{PREFIX}q.lora_magnitude_vector": values(3)}, "which no plain LoRA of peft's has"),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, match):
    folder = write_adapter(tmp_path / "a", attention_pairs())
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=match):
        open_adapter(folder)


def test_two_pairs_for_one_map(tmp_path):
    folder = write_adapter(tmp_path / "a", {"experts": pair(4, 4), "experts.base_layer": pair(4, 4)})
    with pytest.raises(ValueError, match="two tensors for `experts`"):
        open_adapter(folder)


def test_a_damaged_configuration(tmp_path):
    folder = write_adapter(tmp_path / "a", attention_pairs())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3})[:-1])
    with pytest.raises(ValueError, match=r"adapter_config.json` is damaged or truncated"):
        open_adapter(folder)


def test_what_is_an_adapter(tmp_path):
    folder = write_adapter(tmp_path / "a", attention_pairs())
    assert is_adapter(folder) and is_adapter(folder / "adapter_model.safetensors")
    save_file({"a.weight": values(2, 2)}, tmp_path / "m.safetensors")
    assert not is_adapter(tmp_path) and not is_adapter(tmp_path / "m.safetensors")
