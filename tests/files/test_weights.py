"""A model in one file or several, and directories that are not what they say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_lora.files.weights import keeps_transposed, open_weights, torch_files_in
from tests.helpers.on_disk import base_tensors, values, write_base
from tests.helpers.oracles import same_bits

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor(tmp_path, shards):
    weights = open_weights(write_base(tmp_path / "base", base_tensors(), shards))
    assert weights.tensors.keys() == base_tensors().keys()
    assert all(same_bits(weights.tensors[name].read(), value) for name, value in base_tensors().items())
    assert weights.config == {"tie_word_embeddings": False}
    assert weights.parameters() == sum(value.numel() for value in base_tensors().values())


def test_a_file_of_another_name_and_an_adapter_beside_it(tmp_path):
    save_file({"a.weight": values(2, 2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"b.weight": values(2, 2)}, tmp_path / "adapter_model.safetensors")
    assert list(open_weights(tmp_path).tensors) == ["a.weight"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin", "..", ""]
)
def test_an_index_may_name_files_beside_it_only(tmp_path, name):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    save_file({"a": values(2)}, tmp_path / "x.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"may name only .safetensors files in its own folder"):
        open_weights(base)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map(tmp_path, index):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must have a `weight_map`"):
        open_weights(base)


def test_an_index_that_does_not_fit(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["more.weight"] = "model-00001-of-00002.safetensors"
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds `more.weight`, which it does not"):
        open_weights(base)
    (base / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names `model-00001-of-00002.safetensors`, which is not there"):
        open_weights(base)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_weights(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file.*can run code"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save_file({name: values(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files and no"):
        open_weights(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), 2)
    shard = base / "model-00001-of-00002.safetensors"
    save_file(base_tensors(), shard)
    with pytest.raises(ValueError, match=r"is in model-00001.* and in model-00002"):
        open_weights(base)


LINEAR, TURNED, SQUARE = (6, 8, 6), (6, 8, 8), (8, 8, 8)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"b": (8, 8)}, False),
        ({"b": SQUARE}, "otherwise"),
        ({"a": LINEAR, "b": SQUARE}, False),
        ({"a": TURNED, "b": SQUARE}, True),
        ({"a": TURNED, "c": LINEAR, "b": SQUARE}, None),
        ({"h.0.a": TURNED, "head": LINEAR, "h.1.a": TURNED, "h.0.b": SQUARE}, True),
    ],
)
def test_which_side_the_biases_tell(tmp_path, shapes, expected):
    tensors = {}
    for name, (first, second, *bias) in shapes.items():
        tensors |= {f"{name}.weight": torch.zeros(first, second)} | {f"{name}.bias": torch.zeros(size) for size in bias}
    save_file(tensors, tmp_path / "x.safetensors")
    name = next(name for name in shapes if name.endswith("b"))
    for otherwise in (True, False):
        wanted = otherwise if expected == "otherwise" else expected
        assert keeps_transposed(name, open_weights(tmp_path), otherwise) is wanted


def test_files_of_torch_save_are_found_where_there_are_no_others(tmp_path):
    assert torch_files_in(tmp_path) == []
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.bin", "b": "y.bin"}}))
    with pytest.raises(FileNotFoundError, match=r"names `x.bin`, which is not there"):
        torch_files_in(tmp_path)
    for name in ("x.bin", "y.bin"):
        (tmp_path / name).touch()
    assert torch_files_in(tmp_path) == [tmp_path / "x.bin", tmp_path / "y.bin"]
    (tmp_path / "pytorch_model.bin").touch()
    assert torch_files_in(tmp_path) == [tmp_path / "pytorch_model.bin"]
    save_file({"a": values(2)}, tmp_path / "adapter_model.safetensors")
    assert torch_files_in(tmp_path)
    save_file({"a": values(2)}, tmp_path / "model.safetensors")
    assert torch_files_in(tmp_path) == []


def test_an_index_of_torch_files_may_name_those_beside_it_only(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(ValueError, match=r"names the file `../x.bin`, but may name only .bin files in its own folder"):
        torch_files_in(tmp_path)
