"""Files from a stranger: whatever is in them, one clear ValueError, or what the file says."""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, lora_parameters, save_adapter
from lightning_lora.files.json_files import read_object
from lightning_lora.files.safetensors import check_dtypes, open_tensors
from tests.helpers.oracles import same_bits, snapshot, train_by_hand

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"


def net():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def written(folder):
    model = net()
    apply_lora(model, LoRAConfig(r=2, alpha=6, targets=["0"], also_train=["2"]))
    train_by_hand(model)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def directory(tmp_path):
    return written(tmp_path)


def facts(model):
    """Everything about a model that an error must leave as it was."""
    modules = list(model.modules())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return [type(module) for module in modules], [set(vars(module)) for module in modules], flags


def load_into_bare(directory):
    """The model after loading, or the ValueError; after one the model is as before."""
    model = net()
    before, known = snapshot(model), facts(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_adapter(model, directory)
    except ValueError as error:
        assert facts(model) == known
        assert list(before) == list(model.state_dict())
        assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
        return error
    return model


def rewritten(directory, **changes):
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**values, **changes}))


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)
BROKEN = {
    "empty": (b"", "is not a whole safetensors file"),
    "short": (b"\x01\x02", "is not a whole safetensors file"),
    "header-of-an-exabyte": (struct.pack("<Q", 2**60) + b"{}", f"its header would have {2**60} bytes"),
    "header-past-the-end": (struct.pack("<Q", 100) + b"{}", "its header would have 100 bytes"),
    "no-json": (with_header(b"not json"), "is not a whole safetensors file"),
    "no-text": (with_header(b"\xff\xfe{}"), "is not a whole safetensors file"),
    "deep": (with_header(b"[" * 100_000), "is not a whole safetensors file"),
    "list": (with_header([1, 2]), r"must hold a JSON object, but holds `\[1, 2\]`"),
    "entry-that-is-none": (with_header({"a": 3}), "is not a whole safetensors file"),
    "fp8": (with_header({"a": entry("F8_E4M3", offsets=(0, 6))}, b"\0" * 6), "holds `a` as `F8_E4M3`; an adapter is"),
    "unknown-dtype": (with_header({"a": entry("Q9")}, b"\0" * 24), "is not a whole safetensors file"),
    "twice": (with_header(TWICE, b"\0" * 24), "`a` is there twice"),
    "cut": (with_header({"a": entry()}, b"\0" * 23), "is not a whole safetensors file"),
    "longer": (with_header({"a": entry()}, b"\0" * 25), "is not a whole safetensors file"),
    "absurd-shape": (with_header({"a": entry(shape=(2**40, 2**40))}, b"\0" * 24), "is not a whole safetensors file"),
    "negative-shape": (with_header({"a": entry(shape=(-2, -3))}, b"\0" * 24), "is not a whole safetensors file"),
    "number-too-long": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "is not a whole safetensors file"),
    "offsets-back": (with_header({"a": entry(offsets=(24, 0))}, b"\0" * 24), "is not a whole safetensors file"),
    "metadata": (with_header({"__metadata__": {"step": 3}}), "is not a whole safetensors file"),
    "metadata-list": (with_header({"__metadata__": []}), "is not a whole safetensors file"),
    "nan": (save({"a": torch.tensor([1.0, float("nan")])}), "holds NaN or infinity in `a`"),
    "infinity": (save({"a": torch.tensor([1.0, -float("inf")]).bfloat16()}), "holds NaN or infinity in `a`"),
}


def read_tensors(path):
    file = open_tensors(path)
    check_dtypes(file)
    return {name: tensor.read_finite() for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors(case, tmp_path, directory):
    content, words = BROKEN[case]
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_tensors(tmp_path / WEIGHTS)
    assert isinstance(load_into_bare(tmp_path), ValueError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged or truncated"),
        (b"[1, 2]", r"must hold a JSON object, but holds `\[1, 2\]`"),
        (b"7", "must hold a JSON object, but holds `7`"),
        (b'{"r": 1, "r": 2}', "`r` is there twice"),
        (b"[" * 100_000, "is damaged or truncated"),
        (b"\xff{}", "is damaged or truncated"),
        (b" " * 100_000_001, "has 100,000,001 bytes, too many for a configuration"),
    ],
)
def test_broken_json(content, words, tmp_path):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_object(tmp_path / CONFIG)


TENSORS = {
    "other-shape": ({A: torch.ones(2, 5)}, r"`0.lora_A.weight` must have shape \(2, 3\) with the rank .* \(2, 5\)"),
    "turned": ({B: torch.ones(2, 4)}, r"`0` has A of shape \(2, 3\) and B of shape \(2, 4\)"),
    "other-rank": ({A: torch.ones(3, 3), B: torch.ones(4, 3)}, r"`0` has rank 3 in .*, but adapter_config.json says 2"),
    "integers": (
        {A: torch.ones(2, 3, dtype=torch.int64)},
        r"`0` has A of I64 and B of F32 in .*, but they must be F64",
    ),
    "too-large": ({A: torch.full((2, 3), 1e300, dtype=torch.float64)}, "values that float32 has no room for"),
    "lacks-a-half": ({B: None}, r"`0` needs one A and one B, but .* has lora_A.weight"),
    "hostile-name": ({"base_model.model.../../x.lora_A.weight": torch.ones(2, 3)}, r"`../../x` needs one A and one B"),
    "absolute-name": ({"/etc/passwd": torch.ones(2)}, "holds `/etc/passwd`, which no plain LoRA"),
    "unknown-name": ({"base_model.model.7.weight": torch.ones(2)}, "has `7.weight`, which the model does not have"),
    "long-name": ({"x" * 10_000: torch.ones(2)}, r"holds `x{150}\.\.\.`, which"),
    "line-break": ({"base_model.model.a\nb": torch.ones(2)}, r"holds `base_model\.model\.a\\nb`, which is no name"),
    "dora": ({"base_model.model.0.lora_magnitude_vector": torch.ones(4)}, "which no plain LoRA of peft's has"),
    "adapter-bias": ({"base_model.model.0.lora_B.bias": torch.ones(4)}, "which no plain LoRA of peft's has"),
    "frozen": ({"base_model.model.0.base_layer.weight": torch.ones(4, 3)}, "holds `0.weight` of its base, and the"),
    "twice": (
        {f"base_model.model.0.{key}weight": net()[0].weight.detach().clone() for key in ("", "base_layer.")},
        "has two tensors for `0.weight`",
    ),
    "trained-shape": (
        {"base_model.model.2.weight": torch.ones(2, 5)},
        r"`2.weight` has shape \(2, 5\) in the file and",
    ),
    "trained-dtype": (
        {"base_model.model.2.weight": torch.ones(2, 4, dtype=torch.int32)},
        r"`2.weight` is of torch.int32",
    ),
    "buffer-dtype": ({"base_model.model.1.num_batches_tracked": torch.tensor(1.0)}, "is of torch.float32 in the file"),
    "trained-lacks": ({"base_model.model.2.weight": None}, "lacks `2.weight`"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(case, directory):
    changes, words = TENSORS[case]
    tensors = {**load_file(directory / WEIGHTS), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, directory / WEIGHTS)
    with pytest.raises(ValueError, match=words):
        raise load_into_bare(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_fp32(dtype, directory):
    tensors = {key: value.to(dtype) for key, value in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS)
    model = load_into_bare(directory)
    assert model[0].lora.default.A.dtype == torch.float32
    assert torch.equal(model[0].lora.default.A, tensors[A].float())
    assert torch.equal(model[2].weight, tensors["base_model.model.2.weight"].float())


def test_a_changed_bit_of_our_own_file_is_told(directory):
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its values are not those it was written with"):
        raise load_into_bare(directory)


def test_a_damaged_header_of_ours(directory):
    for base in ("[", "[1]", '{"0.weight": "x"}', '{"0.weight": [1]}', '{"0.weight": [1, 2, "3"]}'):
        save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"lightning_lora.base": base})
        with pytest.raises(ValueError, match="The header of the adapter's file is damaged"):
            raise load_into_bare(directory)


def test_a_pickle_is_refused(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"holds `adapter_model.bin`, a pickle, .* load it with peft and save it again"
    ):
        raise load_into_bare(directory)


def test_missing_files(directory):
    with pytest.raises(FileNotFoundError, match="`directory` must be a local directory, but there is no `nowhere`"):
        load_adapter(net(), "nowhere")
    (directory / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file `adapter_config.json`"):
        load_adapter(net(), directory)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = written(tmp_path_factory.mktemp("original"))
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


EDITS = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(
        st.just("replace"), st.floats(0, 1), st.sampled_from([b"0", b"-1", b"9", b'"', b"{", b"]", b"null", b"1e999"])
    ),
)


def edited(content, kind, place, what):
    at = int(place * len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    return content[:at] + what + content[at + (len(what) if kind == "replace" else 0) :]


def says(directory):
    """A, B and their scale as the two files have them, read by others."""
    tensors, values = load_file(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())
    rank = values.get("r", 8)
    alpha = values.get("lora_alpha", 8)
    return tensors[A], tensors[B], alpha / (rank**0.5 if values.get("use_rslora") else rank)


def check_damage(original, name, edits, told):
    files = dict(original)
    if not told:  # as a file of peft's, which says nothing of itself
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / WEIGHTS).write_bytes(files[WEIGHTS])
            files[WEIGHTS] = save(load_file(Path(folder) / WEIGHTS))
    for edit in edits:
        files[name] = edited(files[name], *edit) if files[name] else b""
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        model = load_into_bare(Path(folder))
        if isinstance(model, ValueError):
            assert str(model)
            return
        expected = says(Path(folder))
        (adapter,) = model[0].lora.values()
        assert torch.equal(adapter.A, expected[0].float()) and torch.equal(adapter.B, expected[1].float())
        assert adapter.scale == pytest.approx(expected[2])


def damage(examples):
    edits = st.lists(EDITS, min_size=1, max_size=3)
    test = given(name=st.sampled_from([CONFIG, WEIGHTS]), edits=edits, told=st.booleans())(check_damage)
    test = example(name=CONFIG, edits=[("flip", 0.0, 0)], told=True)(test)
    return settings(max_examples=examples, deadline=None, derandomize=True)(test)


test_damage_is_an_error_or_a_load_of_what_is_there = damage(40)
test_any_damage_is_an_error_or_a_load_of_what_is_there = pytest.mark.slow(damage(400))


def test_the_damage_test_sees_both_ends(original, tmp_path):
    """Untouched files load; so its loads are no accident."""
    for file, content in original.items():
        (tmp_path / file).write_bytes(content)
    model = load_into_bare(tmp_path)
    assert [name for name, _ in lora_parameters(model)] == ["0.lora.default.A", "0.lora.default.B"]


def test_a_failing_write_leaves_the_old_files(directory, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    model = net()
    apply_lora(model, LoRAConfig(r=1, targets=["0"]))
    replace = Path.replace
    for failing in (CONFIG, WEIGHTS):

        def fails(self, target, failing=failing):
            if Path(target).name == failing:
                raise OSError("no")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="no"):
            save_adapter(model, directory)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    monkeypatch.setattr("lightning_lora.peft_format.save.write_tensors", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
