"""Two adapters or two models compared, against the differences written out."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from lightning_lora.cli.diff import diff_files
from tests.helpers.on_disk import attention_pairs, base_tensors, pair, values, write_adapter, write_base

Q = "model.layers.0.self_attn.q_proj"


def by_name(found):
    return {row.name: row for row in found.rows}


def test_two_adapters(tmp_path):
    one, other = attention_pairs(), attention_pairs() | {Q: pair(8, 8, r=2, seed=7)}
    first = write_adapter(tmp_path / "a", one)
    second = write_adapter(tmp_path / "b", other, rank_pattern={"0.self_attn.q_proj": 2}, lora_alpha=3)
    found = diff_files(first, second)
    assert found.kind == "adapters"
    for name, row in by_name(found).items():
        (A, B), (C, D) = one[name], other[name]
        left, right = 6 / 3 * (B.double() @ A.double()), 3 / D.shape[1] * (D.double() @ C.double())
        assert row.first == pytest.approx(float(left.norm()))
        assert row.second == pytest.approx(float(right.norm()))
        assert row.distance == pytest.approx(float((left - right).norm()))
        assert row.cosine == pytest.approx(float((left * right).sum() / left.norm() / right.norm()))
        assert row.note == ("r 3 and 2" if name == Q else "")
    sizes = [row.relative for row in found.rows]
    assert sizes == sorted(sizes, reverse=True)
    total = found.total()
    assert total.distance == pytest.approx(math.hypot(*(row.distance for row in found.rows)))


def test_equal_deltas_of_other_matrices(tmp_path):
    pairs = attention_pairs()
    first = write_adapter(tmp_path / "a", pairs)
    turned = {
        name: (torch.diag(torch.tensor([2.0, 4, 8])) @ A, B / torch.tensor([2.0, 4, 8]))
        for name, (A, B) in pairs.items()
    }
    second = write_adapter(tmp_path / "b", turned)
    assert max(row.relative for row in diff_files(first, second).rows) < 1e-14
    same = diff_files(first, first)
    assert all(row.distance == 0 and row.cosine == 1 and not row.changed() for row in same.rows)


def test_adapters_of_other_maps(tmp_path):
    one = attention_pairs() | {"only.a": pair(4, 4)}
    other = attention_pairs() | {"only.b": pair(4, 4), Q: pair(8, 9)}
    rows = by_name(diff_files(write_adapter(tmp_path / "a", one), write_adapter(tmp_path / "b", other)))
    assert (rows["only.a"].note, rows["only.a"].second) == ("only in A", None)
    assert (rows["only.b"].note, rows["only.b"].first) == ("only in B", None)
    assert (rows[Q].note, rows[Q].distance) == ("8 -> 8 in A, 9 -> 8 in B", None)


def test_two_models(tmp_path):
    tensors = base_tensors()
    other = tensors | {
        Q + ".weight": tensors[Q + ".weight"] * 1.5,
        "model.norm.weight": tensors["model.norm.weight"].half(),
    }
    other |= {"lm_head.weight": values(21, 8), "new.weight": values(2, 2)}
    del other["model.layers.1.mlp.up_proj.weight"]
    found = diff_files(write_base(tmp_path / "a", tensors), write_base(tmp_path / "b", other, 3))
    rows = by_name(found)
    assert found.kind == "models"
    assert rows[Q + ".weight"].relative == pytest.approx(0.5)
    assert rows[Q + ".weight"].cosine == pytest.approx(1)
    assert (rows["model.norm.weight"].note, rows["model.norm.weight"].distance) == ("F32 and F16", 0)
    assert rows["lm_head.weight"].note == "(20, 8) in A, (21, 8) in B"
    assert rows["new.weight"].note == "only in B" and rows["model.layers.1.mlp.up_proj.weight"].note == "only in A"
    assert sum(row.changed() for row in found.rows) == 5
    assert found.rows[0].relative is None, "what cannot be compared comes first"


def test_bits_that_are_no_numbers(tmp_path):
    tensors = {
        "a.weight": torch.tensor([[math.nan, 1.0]]),
        "b.weight": torch.tensor([[math.inf]]),
        "c": torch.tensor([1, 2]),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors | {"b.weight": torch.tensor([[1.0]]), "c": torch.tensor([1, 4])}, tmp_path / "b.safetensors")
    rows = by_name(diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert not rows["a.weight"].changed()
    assert rows["b.weight"].changed() and rows["b.weight"].note == "NaN or infinity"
    assert rows["c"].distance == 2


def test_two_kinds(tmp_path):
    adapter, base = write_adapter(tmp_path / "a", attention_pairs()), write_base(tmp_path / "b", base_tensors())
    with pytest.raises(ValueError, match=r"a` is an adapter and `.*b` is a model: give two of a kind"):
        diff_files(base, adapter)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        diff_files(base, tmp_path / "none")


def test_several_adapters_by_their_names(tmp_path):
    """Those that only one side has count too; several against one are refused."""
    for side, factor in (("first", 1), ("second", 2)):
        write_adapter(tmp_path / side / "fr", attention_pairs())
        write_adapter(tmp_path / side / "de", {name: (A, factor * B) for name, (A, B) in attention_pairs().items()})
    write_adapter(tmp_path / "second" / "es", attention_pairs())
    rows = {row.name: row for row in diff_files(tmp_path / "first", tmp_path / "second").rows}
    assert rows.keys() == {f"{name}: {layer}" for name in ("fr", "de", "es") for layer in attention_pairs()}
    for layer in attention_pairs():
        assert not rows[f"fr: {layer}"].changed()
        assert rows[f"de: {layer}"].relative == pytest.approx(1.0)
        assert rows[f"es: {layer}"].note == "only in B"
    with pytest.raises(ValueError, match="holds the adapters de, fr in sub-directories"):
        diff_files(tmp_path / "first", tmp_path / "first" / "fr")
