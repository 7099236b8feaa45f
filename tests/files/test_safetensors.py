"""Single safetensors files: reading by rows, and files that are not what they say."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lightning_lora.files.safetensors import open_tensors
from lightning_lora.files.safetensors_writing import write_like
from tests.helpers.oracles import same_bits

SAFETENSORS = tuple(map(int, safetensors.__version__.split(".")[:2]))
TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "half": torch.arange(6).view(2, 3).bfloat16(),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 3),
    "kernel": torch.randn(2, 3, 2, 2),
    "mask": torch.tensor([True, False, True]),
}


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    file = open_tensors(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert same_bits(file.tensors[name].read(), value), name


@pytest.mark.parametrize("slab", [1, 5, 1000])
def test_slabs_are_the_rows(tmp_path, monkeypatch, slab):
    monkeypatch.setattr("lightning_lora.files.safetensors.SLAB", slab)
    save_file(TENSORS, tmp_path / "x.safetensors")
    for name, tensor in open_tensors(tmp_path / "x.safetensors").tensors.items():
        parts = list(tensor.slabs())
        expected = TENSORS[name].reshape(tensor.matrix_shape())
        assert torch.equal(torch.cat([rows for _, rows in parts]) if parts else expected[:0], expected)
        assert all(torch.equal(expected[where], rows) for where, rows in parts)


def test_a_copy_with_other_values_loads_in_the_library(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    other, sizes = torch.ones(3, 4) * 5, []
    added = {"new": torch.ones(2, dtype=torch.float16)}
    write_like(
        open_tensors(tmp_path / "x.safetensors"),
        tmp_path / "y.safetensors",
        {"a": iter(other.split(1))},
        added,
        sizes.append,
    )
    assert {name: value.tolist() for name, value in load_file(tmp_path / "y.safetensors").items()} == {
        name: value.tolist() for name, value in (TENSORS | {"a": other} | added).items()
    }
    assert sum(sizes) == sum(value.nbytes for value in TENSORS.values())


def test_values_of_another_size_are_noticed(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="came out of another size"):
        write_like(open_tensors(tmp_path / "x.safetensors"), tmp_path / "y", {"a": [torch.ones(3)]}, {}, print)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "length": struct.pack("<Q", 2**60) + b"{}",
    "cut": struct.pack("<Q", 500) + b"{}",
    "no-json": struct.pack("<Q", 4) + b"{{{{",
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
}
HEADERS = {
    "cut-data": ({"a": ENTRY}, b"1234"),
    "more-data": ({"a": ENTRY}, b"1" * 12),
    "overlap": ({"a": ENTRY, "b": ENTRY}, b"1" * 8),
    "hole": ({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"1" * 16),
    "negative": ({"a": {**ENTRY, "shape": [-2]}}, b"1" * 8),
    "huge": ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"1" * 8),
    "other-size": ({"a": {**ENTRY, "shape": [3]}}, b"1" * 8),
    "dtype": ({"a": {**ENTRY, "dtype": "F33"}}, b"1" * 8),
    "metadata": ({"a": ENTRY, "__metadata__": {"x": 1}}, b"1" * 8),
    "list": ([1], b""),
}


@pytest.mark.parametrize("kind", [*HOSTILE, *HEADERS])
def test_hostile_files(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[kind]) if kind in HOSTILE else written(path, *HEADERS[kind])
    with pytest.raises(ValueError, match=r"`.*x.safetensors` is not a whole safetensors file"):
        open_tensors(path)


@pytest.mark.parametrize(("name", "as_shown"), [("a\x1b[2J", r"a\\x1b\[2J"), ("a" * 5000, r"a{150}\.\.\.")])
def test_names_that_no_tensor_has(tmp_path, name, as_shown):
    written(tmp_path / "x.safetensors", {name: ENTRY}, b"1" * 8)
    with pytest.raises(ValueError, match=rf"holds `{as_shown}`, which is no name of a tensor"):
        open_tensors(tmp_path / "x.safetensors")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        open_tensors(tmp_path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
    save_file({"a": torch.ones(4000)}, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    with file.path.open("r+b") as raw:
        raw.truncate(1000)
    with pytest.raises(ValueError, match="changed or cut since"):
        file.tensors["a"].read()
    with pytest.raises(ValueError, match="changed or cut since"):
        write_like(file, tmp_path / "y", {}, {}, print)


@pytest.mark.skipif(SAFETENSORS < (0, 6), reason="the library does not know the dtype")
def test_a_dtype_that_torch_lacks(tmp_path):
    path = written(
        tmp_path / "x.safetensors", {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, b"1" * 8
    )
    with pytest.raises(ValueError, match=r"`a` in .* is of F8_E8M0, which cannot be computed with"):
        open_tensors(path).tensors["a"].read()
