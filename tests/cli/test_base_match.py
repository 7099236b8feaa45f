"""Which tensors an adapter changes; what is refused is in test_merge_files.py, where nothing may be written."""

from __future__ import annotations

import pytest

from lightning_lora.cli.base_match import changes
from lightning_lora.files.weights import open_weights
from lightning_lora.peft_format.stored import open_adapter
from tests.helpers.on_disk import attention_pairs, base_tensors, pair, values, write_adapter, write_base


def found(tmp_path, pairs, whole=None, tensors=None):
    base = write_base(tmp_path / "base", base_tensors() if tensors is None else tensors)
    return changes(open_adapter(write_adapter(tmp_path / "adapter", pairs, whole)), open_weights(base))


def test_names_as_they_are(tmp_path):
    change = found(tmp_path, attention_pairs(), {"score.weight": values(2, 8), "model.norm.weight": values(8)})
    assert change.pairs.keys() == {f"{name}.weight" for name in attention_pairs()}
    assert change.in_full.keys() == {"score.weight", "model.norm.weight"}
    assert not any(target.transposed for target in change.pairs.values())


@pytest.mark.parametrize("start", ["", "transformer."])
def test_a_leading_part_on_one_side(tmp_path, start):
    inner = {name.removeprefix("model."): value for name, value in base_tensors().items()}
    pairs = {start + name.removeprefix("model."): value for name, value in attention_pairs().items()}
    whole = {f"{start}norm.weight": values(8), "score.weight": values(2, 8)}
    change = found(tmp_path, pairs, whole, inner)
    assert change.pairs.keys() == {f"{name.removeprefix('model.')}.weight" for name in attention_pairs()}
    assert change.in_full.keys() == {"norm.weight", "score.weight"}


def test_not_when_it_finds_only_some(tmp_path):
    pairs = {"transformer.model.layers.0.self_attn.q_proj": pair(8, 8), "transformer.other": pair(8, 8)}
    with pytest.raises(ValueError, match=r"no tensor `transformer.model.layers.0.self_attn.q_proj.weight`"):
        found(tmp_path, pairs)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*layers\.\d\.self_attn\.(q|v)_proj"])
@pytest.mark.parametrize("start", ["", "model."])
def test_a_layer_that_the_configuration_names_has_a_pair(tmp_path, targets, start):
    pairs = {start + name.removeprefix("model."): value for name, value in attention_pairs().items()}
    base = open_weights(write_base(tmp_path / "base", base_tensors()))
    whole = write_adapter(tmp_path / "whole", pairs, target_modules=targets)
    assert len(changes(open_adapter(whole), base).pairs) == 4
    gone, *_ = pairs
    cut = write_adapter(tmp_path / "cut", {n: p for n, p in pairs.items() if n != gone}, target_modules=targets)
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj` is named by `target_modules` of .*/cut`"):
        changes(open_adapter(cut), base)
