"""The base in full precision in a file: found by names, and refused where it is another model's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.layers.quantized.formats import is_quantized
from lightning_lora.model.quantized.base_file import check_samples, open_base

pytest.importorskip("bitsandbytes")
from tests.helpers.quantized import four_bits


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.q, self.v, self.ln = nn.Embedding(8, 64), nn.Linear(64, 64), nn.Linear(64, 32), nn.LayerNorm(32)


def values() -> dict[str, torch.Tensor]:
    return Small().state_dict()


def quantized(adapted: bool = False) -> nn.Module:
    """As a LightningModule holds it: under ``net``."""
    model = nn.ModuleDict({"net": Small()})
    model.net.q, model.net.v = four_bits(model.net.q), four_bits(model.net.v)
    if adapted:
        apply_lora(model, LoRAConfig(r=2, targets=["q"]))
    return model


def as_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_directory(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    as_safetensors(folder, tensors)
    return folder


def as_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + (name == names[0])}.safetensors" for name in names}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def as_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"state_dict": {f"net.{name}": value for name, value in tensors.items()}, "epoch": 1}, folder / "a.ckpt")
    return folder / "a.ckpt"


def as_state_dict(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "a.pt")
    return folder / "a.pt"


def as_bin_directory(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def as_bin_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{1 + (name == names[0])}.bin" for name in names}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_bin_index(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return as_bin_shards(folder, tensors) / "pytorch_model.bin.index.json"


SAFETENSORS = [as_safetensors, as_directory, as_shards]
OF_TORCH_SAVE = [as_checkpoint, as_state_dict, as_bin_directory, as_bin_shards, as_bin_index]


@pytest.mark.parametrize("write", [*SAFETENSORS, *OF_TORCH_SAVE])
def test_files_that_are_read(tmp_path, write):
    base = open_base(str(write(tmp_path, values())), model := quantized())
    assert torch.equal(base.weight("net.q", model.net.q), values()["q.weight"])
    check_samples(base, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"q.weight": None},
            r"has no tensor `net.q.weight` for a quantized layer.*Name the file of the model",
        ),
        (
            {"q.weight": torch.zeros(64, 32)},
            r"`q.weight` of .* has shape \(64, 32\), and this model's layer has \(64, 6",
        ),
        (
            {"q.weight": torch.zeros(64, 64, dtype=torch.uint8)},
            r"`q.weight` of .* is of torch.uint8: it is quantized",
        ),
        (
            {"v.weight": torch.randn(32, 64)},
            r"`net.v.weight` of .* is not what this base was quantized from: qu",
        ),
        (
            {"v.weight": torch.full((32, 64), torch.nan)},
            r"`net.v.weight` of .* is not what this base was quantized from",
        ),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, change, words):
    tensors = {name: value for name, value in {**values(), **change}.items() if value is not None}
    model = quantized(adapted=True)
    with pytest.raises(ValueError, match=words):
        merge_lora(model, base=as_safetensors(tmp_path, tensors))
    assert is_quantized(model.net.q) and is_quantized(model.net.v)
    merge_lora(model, base=as_safetensors(tmp_path, values()))
    merge_lora(model, dequantize=True)


def test_a_fine_tune_of_the_base_is_another_model(tmp_path):
    other = {name: value + 0.01 * value.std() * torch.randn_like(value) for name, value in values().items()}
    with pytest.raises(ValueError, match=r"quantized, it is \d\.\d% away, where rounding explains 4%"):
        merge_lora(quantized(adapted=True), base=as_safetensors(tmp_path, other))


def test_a_copy_in_bf16_is_the_same_model(tmp_path):
    path = as_safetensors(tmp_path, {name: value.bfloat16() for name, value in values().items()})
    model = quantized(adapted=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(model, base=path)
    assert torch.equal(model.net.v.weight, values()["v.weight"].bfloat16().float())


def test_a_file_with_the_layers_at_two_places_is_refused(tmp_path):
    tensors = {f"{start}.net.{name}": value for start in "ab" for name, value in values().items()}
    with pytest.raises(ValueError, match=r"has the layers of this model at `a` and at `b`"):
        open_base(str(as_state_dict(tmp_path, tensors)), quantized())
    one = {name: value for name, value in tensors.items() if name.startswith("a")}
    check_samples(open_base(str(as_state_dict(tmp_path, one)), quantized()), quantized())


def test_a_checkpoint_of_adapters_is_no_base(tmp_path):
    torch.save({"state_dict": {}, "lightning_lora": {}}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="holds adapters of a run, and no base in full precision"):
        open_base(str(tmp_path / "run.ckpt"), quantized())


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json cannot be read as weights \(ValueError: it is no zip archive"):
        open_base(str(tmp_path / "config.json"), quantized())
    torch.save({"state_dict": values(), "hyper_parameters": {"folder": tmp_path}}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"run.ckpt cannot be read as weights \(ObjectRefusedError: pathlib"):
        open_base(str(tmp_path / "run.ckpt"), quantized())
    state = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    open_base(str(as_state_dict(tmp_path, state)), quantized())  # the remedy


def test_a_name_of_the_hub_is_no_path():
    with pytest.raises(FileNotFoundError, match=r"`owner/name` does not exist: .*snapshot_download\(name\) returns"):
        open_base("owner/name", quantized())


def test_parameters_that_are_not_quantized_and_differ_are_named_in_a_warning(tmp_path):
    tensors = {**values(), "emb.weight": torch.zeros(8, 64)}
    del tensors["ln.bias"]
    model = quantized(adapted=True)
    before = model.net.emb.weight.clone()
    with pytest.warns(UserWarning, match=r"2 differ from .*: `net.emb.weight`, `net.ln.bias` \(not in the file\)\."):
        merge_lora(model, base=as_safetensors(tmp_path, tensors))
    assert torch.equal(model.net.emb.weight, before)


@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computes", [torch.float32, torch.bfloat16])
def test_a_bias_that_was_loaded_in_a_half_dtype_and_cast_by_a_call_is_the_same(tmp_path, loaded, computes):
    model = nn.ModuleDict({"net": Small().to(loaded)})
    for name in ("q", "v"):
        setattr(model.net, name, four_bits(getattr(model.net, name), compute_dtype=computes))
    apply_lora(model, LoRAConfig(r=2, targets=["q"]))
    model.net.q(torch.ones(1, 64, dtype=loaded))
    assert model.net.q.bias.dtype == computes
    path = as_safetensors(tmp_path, values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(model, base=path)


def test_another_bias_of_a_quantized_layer_is_named(tmp_path):
    tensors = values()
    tensors["q.bias"] = 1.1 * tensors["q.bias"]
    with pytest.warns(UserWarning, match=r"1 differ from .*: `net.q.bias`\."):
        merge_lora(quantized(adapted=True), base=as_safetensors(tmp_path, tensors))


def test_the_file_is_opened_once(tmp_path, monkeypatch):
    """A file of ``torch.save`` is read whole when it is opened, as its checksums are compared."""
    opened = []
    monkeypatch.setattr("lightning_lora.model.quantized.base_file.checked", lambda *a: opened.append(a[0]) or a[2]())
    merge_lora(quantized(adapted=True), base=as_state_dict(tmp_path, values()))
    assert opened == [tmp_path / "a.pt"]
