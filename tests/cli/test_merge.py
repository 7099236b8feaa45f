"""Merging files: against the formula written out, against peft, and everything that must be refused."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, apply_lora, load_lora_state_dict, lora_parameters, merge_lora, save_adapter
from lightning_lora.cli.merge import merge_files
from lightning_lora.files.safetensors import open_tensors
from tests.helpers.models import net
from tests.helpers.on_disk import (
    attention_pairs,
    base_tensors,
    everything_in,
    listing,
    pair,
    values,
    write_adapter,
    write_base,
)
from tests.helpers.oracles import same_bits
from tests.helpers.several import THREE, with_adapters

SAFETENSORS = tuple(map(int, safetensors.__version__.split(".")[:2]))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def formula(weight, A, B, scale=2.0):
    """The sum, rounded once, with ``B A`` made in fp64."""
    return (weight.double() + scale * (B.double() @ A.double())).to(weight.dtype)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula(tmp_path, dtype, shards):
    tensors, pairs = base_tensors(dtype), attention_pairs()
    base, adapter = write_base(tmp_path / "base", tensors, shards), write_adapter(tmp_path / "adapter", pairs)
    report = merge_files(base, adapter, tmp_path / "out")
    merged = everything_in(tmp_path / "out")
    assert merged.keys() == tensors.keys()
    for name, weight in tensors.items():
        A, B = pairs.get(name.removesuffix(".weight"), (None, None))
        if A is None:
            assert same_bits(merged[name], weight), name
            continue
        expected = formula(weight, A, B)
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name], expected, rtol=float(torch.finfo(dtype).eps) * 2, atol=1e-7)
        delta = 2.0 * (B.double() @ A.double())
        layer = report.layers[name]
        assert layer.delta == pytest.approx(float(delta.norm()), rel=1e-6)
        assert layer.weight == pytest.approx(float(weight.double().norm()), rel=1e-6)
        lost = float((merged[name].double() - weight.double() - delta).norm() / delta.norm())
        assert layer.lost == pytest.approx(lost, rel=0.01, abs=2e-7)
    assert report.layers.keys() == {f"{name}.weight" for name in pairs}


@pytest.mark.parametrize("shards", [1, 2])
def test_the_layout_stays(tmp_path, shards):
    base = write_base(tmp_path / "base", base_tensors(), shards)
    (base / "sub").mkdir()
    (base / "sub" / "pooling.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "adapter_config.json").write_text("{}")
    (base / ".cache").mkdir()
    (base / ".cache" / "x").write_text("x")
    report = merge_files(base, write_adapter(tmp_path / "adapter", attention_pairs()), tmp_path / "out")
    assert report.left_out == ["adapter_config.json", "pytorch_model.bin"]
    kept = [name for name in listing(base) if name not in report.left_out and not name.startswith(".cache")]
    assert listing(tmp_path / "out") == kept
    for name in ("config.json", "tokenizer.json", "sub/pooling.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(tmp_path / "out" / path.name, "pt") as after:
            assert after.metadata() == before.metadata() == {"format": "pt"}
            assert set(after.keys()) == set(before.keys())
    assert listing(tmp_path) == sorted(listing(tmp_path)), "nothing beside"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_one_file_to_one_file(tmp_path):
    save_file(base_tensors(), tmp_path / "base.safetensors")
    adapter = write_adapter(tmp_path / "adapter", attention_pairs())
    merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    expected = formula(base_tensors()[f"{name}.weight"], *attention_pairs()[name])
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[f"{name}.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_merge_lora(tmp_path, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 70), torch.nn.Linear(70, 30), torch.nn.Embedding(11, 6)).to(dtype)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    apply_lora(model, LoRAConfig(r=3, alpha=5, targets=["0", "1"]))
    pairs = {"0": pair(70, 50), "1": pair(30, 70)}
    state = {
        f"{name}.lora.default.{letter}": value
        for name, both in pairs.items()
        for letter, value in zip("AB", both, strict=True)
    }
    load_lora_state_dict(model, state)
    lost = merge_lora(model)
    adapter = write_adapter(tmp_path / "adapter", pairs, lora_alpha=5)
    report = merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(merged[name], value) for name, value in model.state_dict().items())
    assert {name: report.layers[f"{name}.weight"].lost for name in lost} == pytest.approx(lost)


def test_slabs_join(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lora.files.safetensors.SLAB", 17)
    base, adapter = (
        write_base(tmp_path / "base", base_tensors()),
        write_adapter(tmp_path / "adapter", attention_pairs()),
    )
    some = merge_files(base, adapter, tmp_path / "some")
    monkeypatch.undo()
    whole = merge_files(base, adapter, tmp_path / "whole")
    assert (tmp_path / "some/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert some.lost() == pytest.approx(whole.lost())


@contextmanager
def written_late(file):
    """A piece is written when the next one comes, as a slow disk may."""
    last = [b""]

    def write(piece):
        file.write(last[0])
        last[0] = piece

    yield write
    write(b"")


@pytest.mark.parametrize("slab", [10**6, 17, 100])
def test_no_sum_changes_before_it_is_written(tmp_path, monkeypatch, slab):
    """Neighbours of one, an odd and an even number of slabs."""
    save_file({f"{name}.weight": torch.randn(15, 10) for name in "abcd"}, tmp_path / "base.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {name: pair(15, 10, seed=seed) for seed, name in enumerate("abcd")})
    merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "whole.safetensors")
    monkeypatch.setattr("lightning_lora.files.safetensors.SLAB", slab)
    monkeypatch.setattr("lightning_lora.files.safetensors_writing.write_behind", written_late)
    merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "late.safetensors")
    whole, late = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "late"))
    assert all(same_bits(late[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 12}, [4.0, 4.0]),
        ({"use_rslora": True}, [6 / math.sqrt(3)] * 2),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 9}}, [2.0, 3.0]),
        ({"alpha_pattern": {r"^model\.layers\.[01]\.self_attn\.q_proj": 3, "q_proj": 9}}, [1.0, 1.0]),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 3}}, [16 / 3] * 2),
    ],
)
def test_scales(tmp_path, config, scales):
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    pairs = {name: attention_pairs()[name] for name in names}
    base, adapter = write_base(tmp_path / "base", base_tensors()), write_adapter(tmp_path / "adapter", pairs, **config)
    merge_files(base, adapter, tmp_path / "out")
    merged = everything_in(tmp_path / "out")
    for name, scale in zip(names, scales, strict=True):
        torch.testing.assert_close(
            merged[f"{name}.weight"], formula(base_tensors()[f"{name}.weight"], *pairs[name], scale)
        )


def gpt2():
    """Maps kept as (in, out), square ones too; the biases tell."""
    tensors = {"wte.weight": values(20, 6)}
    for seed, (name, shape) in enumerate({"attn.c_attn": (6, 18), "attn.c_proj": (6, 6), "mlp.c_fc": (6, 24)}.items()):
        tensors[f"h.0.{name}.weight"] = values(*shape, seed=seed)
        tensors[f"h.0.{name}.bias"] = values(shape[1], seed=seed)
    return tensors


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("fan", [True, False])
def test_transposed_maps_and_a_leading_part_of_the_names(tmp_path, fan, prefix):
    pairs = {f"{prefix}h.0.attn.c_attn": pair(18, 6), f"{prefix}h.0.attn.c_proj": pair(6, 6)}
    base = write_base(tmp_path / "base", gpt2())
    merge_files(base, write_adapter(tmp_path / "adapter", pairs, fan_in_fan_out=fan), tmp_path / "out")
    merged = everything_in(tmp_path / "out")
    for name, (A, B) in pairs.items():
        key = f"{name.removeprefix('transformer.')}.weight"
        torch.testing.assert_close(merged[key], formula(gpt2()[key].T, A, B).T)


def test_a_base_whose_names_have_one_part_more(tmp_path):
    base = write_base(tmp_path / "base", {f"bert.{name}": value for name, value in gpt2().items()})
    A, B = pair(18, 6)
    merge_files(base, write_adapter(tmp_path / "adapter", {"h.0.attn.c_attn": (A, B)}), tmp_path / "out")
    key = "bert.h.0.attn.c_attn.weight"
    torch.testing.assert_close(everything_in(tmp_path / "out")[key], formula(gpt2()[key[5:]].T, A, B).T)


def test_square_maps_without_a_bias_are_linear_whatever_the_configuration_says(tmp_path):
    base, (A, B) = write_base(tmp_path / "base", {"up.weight": values(6, 6)}), pair(6, 6)
    for fan in (True, False):
        merge_files(base, write_adapter(tmp_path / f"a{fan}", {"up": (A, B)}, fan_in_fan_out=fan), tmp_path / f"o{fan}")
        delta = 2 * (B @ A)
        torch.testing.assert_close(everything_in(tmp_path / f"o{fan}")["up.weight"], values(6, 6) + delta)


def test_convolutions_embeddings_and_multihead_attention_as_peft_writes_them(tmp_path):
    tensors = {"conv.weight": values(6, 4, 3, 3), "table.weight": values(11, 5), "attn.in_proj_weight": values(24, 8)}
    A, B = values(3, 4, 3, 3, seed=1), values(6, 3, 1, 1, seed=2)
    C, D, E, F = values(3, 11, seed=3), values(5, 3, seed=4), values(3, 8, seed=5), values(24, 3, seed=6)
    targets = ["conv", "table", "attn"]
    adapter = write_adapter(tmp_path / "adapter", {"conv": (A, B), "attn": (E, F)}, target_modules=targets)
    stored = load_file(adapter / "adapter_model.safetensors")
    stored |= {"base_model.model.table.lora_embedding_A": C, "base_model.model.table.lora_embedding_B": D}
    save_file(stored, adapter / "adapter_model.safetensors")
    merge_files(write_base(tmp_path / "base", tensors), adapter, tmp_path / "out")
    merged = everything_in(tmp_path / "out")
    kernel = torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    torch.testing.assert_close(merged["conv.weight"], tensors["conv.weight"] + 2 * kernel)
    torch.testing.assert_close(merged["table.weight"], tensors["table.weight"] + 2 * (D @ C).T)
    torch.testing.assert_close(merged["attn.in_proj_weight"], tensors["attn.in_proj_weight"] + 2 * F @ E)


@pytest.mark.parametrize("shards", [1, 2])
def test_modules_that_the_adapter_has_in_full(tmp_path, shards):
    base = write_base(tmp_path / "base", base_tensors(torch.bfloat16), shards)
    whole = {"model.norm.weight": values(8, seed=3), "score.weight": values(2, 8, seed=4)}
    adapter = write_adapter(tmp_path / "adapter", attention_pairs(), whole, modules_to_save=["score"])
    report = merge_files(base, adapter, tmp_path / "out")
    assert (report.replaced, report.added) == (["model.norm.weight"], ["score.weight"])
    merged = everything_in(tmp_path / "out")
    assert same_bits(merged["model.norm.weight"], whole["model.norm.weight"].bfloat16())
    assert same_bits(merged["score.weight"], whole["score.weight"])
    if shards == 2:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_merges_to_the_same(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    lora = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"],
        init_lora_weights=False, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload()
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(report.layers) == 8
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_the_embedding_that_peft_writes_beside_its_pair(tmp_path):
    name, (A, B), instead = "model.layers.0.mlp.up_proj", pair(12, 8), values(12, 8, seed=77)
    adapter = write_adapter(tmp_path / "adapter", {name: (A, B)}, {f"{name}.base_layer.weight": instead})
    merge_files(write_base(tmp_path / "base", base_tensors(torch.bfloat16)), adapter, tmp_path / "out")
    merged = everything_in(tmp_path / "out")[f"{name}.weight"]
    torch.testing.assert_close(merged, formula(instead.bfloat16(), A, B))


def tied_config(said):
    return {"architectures": ["LlamaForCausalLM"]} | ({} if said is None else {"tie_word_embeddings": said})


@pytest.mark.slow
def test_peft_merges_gpt2_to_the_same(tmp_path):
    """Transposed maps, square ones too, beside a head that is tied."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"]
    lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True, use_rslora=True)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload()
    assert len(merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").layers) == 8
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("said", [True, None])
@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_tied_weights_are_refused_by_name(tmp_path, target, said):
    tensors = {name: value for name, value in base_tensors().items() if name != "lm_head.weight"}
    base = write_base(tmp_path / "base", tensors, config=tied_config(said))
    adapter = write_adapter(tmp_path / "adapter", attention_pairs() | {target: pair(20, 8)})
    with pytest.raises(
        ValueError, match=rf"`{re.escape(target)}` is tied .* would change both.*tie_word_embeddings=False"
    ):
        merge_files(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(tmp_path, match, pairs=None, tensors=None, whole=None, error=ValueError, **config):
    base = write_base(tmp_path / "base", base_tensors() if tensors is None else tensors)
    adapter = write_adapter(tmp_path / "adapter", attention_pairs() if pairs is None else pairs, whole, **config)
    before = listing(tmp_path)
    with pytest.raises(error, match=match):
        merge_files(base, adapter, tmp_path / "out")
    assert listing(tmp_path) == before, "nothing was written"


def test_unknown_names_are_told_with_the_nearest(tmp_path):
    pairs = attention_pairs() | {"model.layers.0.self_attn.k_proj": pair(8, 8)}
    refused(tmp_path, r"no tensor `model.layers.0.self_attn.k_proj.weight`.*nearest.*self_attn\.[qv]_proj", pairs)


def test_other_shapes(tmp_path):
    pairs = {"model.layers.0.self_attn.q_proj": pair(8, 9)}
    refused(tmp_path, r"has shape \(8, 8\), but the adapter's pair is for 9 -> 8", pairs)


def test_quantized_weights(tmp_path):
    tensors = base_tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8, dtype=torch.int8)}
    refused(tmp_path, "is of I8, whose few bits cannot hold the sum", tensors=tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(tmp_path, bad):
    name = "model.layers.0.self_attn.q_proj"
    A, B = pair(8, 8)
    refused(tmp_path / "1", "NaN or infinity in .*lora_A.weight", {name: (A.index_fill(0, torch.tensor(0), bad), B)})
    refused(tmp_path / "2", "NaN or infinity in .*lora_B.weight", {name: (A, B.index_fill(0, torch.tensor(0), bad))})
    base = base_tensors()
    base[f"{name}.weight"][1, 1] = bad
    refused(tmp_path / "3", "of the base has NaN or infinity", tensors=base)
    half = base_tensors(torch.float16)
    half[f"{name}.weight"][1, 1] = 65504
    huge = {name: (torch.ones(3, 8) * 100, torch.ones(8, 3) * 100)}
    refused(tmp_path / "4", "overflows F16", huge, half)
    refused(tmp_path / "5", "NaN or infinity", whole={"model.norm.weight": torch.full((8,), bad)})
    refused(tmp_path / "6", "NaN or infinity", whole={"score.weight": torch.full((8,), bad)})


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "target_parameters", "layer_replication"])
def test_adapters_that_are_more_than_pairs(tmp_path, field):
    refused(tmp_path, f"has `{field}`, which is not plain LoRA", **{field: True})


def test_adapters_that_changed_their_base(tmp_path):
    refused(tmp_path, "`init_lora_weights` `pissa`, which changed the base", init_lora_weights="pissa")


def test_full_modules_that_do_not_fit(tmp_path):
    whole = {"model.embed_tokens.weight": values(22, 8)}
    refused(tmp_path, r"`model.embed_tokens.weight` is in the adapter in full, of shape \(22, 8\)", whole=whole)


def test_an_interrupted_merge_leaves_nothing(tmp_path):
    base, adapter = (
        write_base(tmp_path / "base", base_tensors(), 3),
        write_adapter(tmp_path / "adapter", attention_pairs()),
    )
    before, count = listing(tmp_path), 0

    def interrupt(size):
        nonlocal count
        count += 1
        if count == 7:
            assert any(".part" in name for name in listing(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, tmp_path / "out", progress=interrupt)
    assert listing(tmp_path) == before
    old = tmp_path / "out"
    merge_files(base, adapter, old)
    kept = {path.name: path.read_bytes() for path in old.iterdir()}
    count = 0
    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, old, overwrite=True, progress=interrupt)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == kept


def test_progress_counts_the_bytes(tmp_path):
    base, adapter = (
        write_base(tmp_path / "base", base_tensors()),
        write_adapter(tmp_path / "adapter", attention_pairs()),
    )
    sizes = []
    merge_files(base, adapter, tmp_path / "out", progress=sizes.append)
    assert sum(sizes) == sum(tensor.nbytes for tensor in base_tensors().values())


@pytest.mark.skipif(SAFETENSORS < (0, 6), reason="the library does not know the dtype")
def test_tensors_of_dtypes_that_torch_lacks_are_copied(tmp_path):
    base = write_base(tmp_path / "base", base_tensors())
    path = base / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["odd"] = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [len(raw) - 8 - length, len(raw) - 4 - length]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + b"abcd")
    merge_files(base, write_adapter(tmp_path / "adapter", attention_pairs()), tmp_path / "out")
    odd = open_tensors(tmp_path / "out/model.safetensors").tensors["odd"]
    assert Path(odd.path).read_bytes()[odd.start : odd.stop] == b"abcd"


def adapted(model, **config):
    """With adapters that do something."""
    apply_lora(model, LoRAConfig(r=2, **config))
    for _, parameter in lora_parameters(model):
        parameter.data = values(*parameter.shape)
    return model


def test_a_base_or_an_adapter_that_changed_since(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    save_file({key: value + 0.5 for key, value in model.state_dict().items()}, tmp_path / "other.safetensors")
    save_adapter(adapted(model, targets="all"), tmp_path / "adapter")
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    with pytest.raises(ValueError, match=r"was trained on another base: `0.weight` has other values"):
        merge_files(tmp_path / "other.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    path = tmp_path / "adapter/adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="file is damaged: its values are not those it was written with"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_parts_of_one_shape_are_told_apart(tmp_path):
    model = torch.nn.ModuleDict({part: torch.nn.Sequential(torch.nn.Linear(6, 4)) for part in ("decoder", "encoder")})
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    before = load_file(tmp_path / "base.safetensors")
    save_adapter(adapted(model, targets=["encoder.0"]), tmp_path / "adapter", inner="encoder")
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert torch.equal(merged["decoder.0.weight"], before["decoder.0.weight"])
    assert not torch.equal(merged["encoder.0.weight"], before["encoder.0.weight"])
    bare = write_adapter(tmp_path / "bare", {"0": (values(3, 6), values(4, 3))})
    with pytest.raises(ValueError, match=r"`0` of the adapter may be `decoder.0` or `encoder.0` of the base"):
        merge_files(tmp_path / "base.safetensors", bare, tmp_path / "out.safetensors")


@pytest.mark.slow
def test_a_turned_square_map_beside_a_linear_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16, num_labels=3)
    model = transformers.GPT2ForTokenClassification(config)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    save_adapter(adapted(model, targets=["attn.c_attn", "attn.c_proj"]), tmp_path / "adapter")
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merge_lora(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[key], value) for key, value in model.state_dict().items())


def test_statistics_that_moved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    adapted(model, targets=["0"]).train()(torch.randn(8, 6))
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged["1.num_batches_tracked"] == 1 and torch.equal(merged["1.running_mean"], model[1].running_mean)


@pytest.mark.parametrize("fan", [True, False])
def test_square_maps_with_a_bias_where_nothing_else_has_one(tmp_path, fan):
    tensors = {"q.weight": values(6, 6), "q.bias": values(6), "up.weight": values(9, 6)}
    base, (A, B) = write_base(tmp_path / "base", tensors), pair(6, 6)
    merge_files(base, write_adapter(tmp_path / "a", {"q": (A, B)}, fan_in_fan_out=fan), tmp_path / "out")
    delta = 2 * (B @ A)
    expected = tensors["q.weight"] + (delta.T if fan else delta)
    torch.testing.assert_close(everything_in(tmp_path / "out")["q.weight"], expected)


def test_links_out_of_the_base_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    base = write_base(tmp_path / "base", base_tensors())
    (base / "notes.txt").symlink_to(secret)
    (base / "vocabulary.json").symlink_to(base / "tokenizer.json")
    report = merge_files(base, write_adapter(tmp_path / "adapter", attention_pairs()), tmp_path / "out")
    assert not (tmp_path / "out/notes.txt").exists() and report.left_out == ["notes.txt"]
    assert (tmp_path / "out/vocabulary.json").read_text() == (base / "tokenizer.json").read_text()


def test_a_snapshot_of_a_hugging_face_cache(tmp_path):
    base = write_base(tmp_path / "snapshots/1234", base_tensors())
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    report = merge_files(base, write_adapter(tmp_path / "adapter", attention_pairs()), tmp_path / "out")
    assert report.left_out == [] and (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [{"fr": 0.7, "de": 0.3, "es": -1.5}, {"de": 1.0, "fr": 0.0, "es": 0.25}])
def test_several_with_weights_give_the_bits_of_merge_lora(tmp_path, dtype, factors):
    base = net().to(dtype)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = with_adapters(base, {name: THREE[name] for name in factors})
    save_adapter(model, tmp_path / "adapters")
    report = merge_files(
        tmp_path / "base.safetensors",
        {tmp_path / "adapters" / name: factor for name, factor in factors.items()},
        tmp_path / "merged.safetensors",
    )
    lost = merge_lora(model, factors)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == model.state_dict().keys()
    assert all(same_bits(merged[key], value) for key, value in model.state_dict().items())
    assert {name.removesuffix(".weight"): layer.lost for name, layer in report.layers.items()} == pytest.approx(
        {name: share for name, share in lost.items() if f"{name}.weight" in report.layers}
    )


def test_tensors_in_full_of_several(tmp_path):
    """The same in both adapters, in one of them, or refused."""
    base, name = write_base(tmp_path / "base", base_tensors()), "model.layers.0.self_attn.q_proj"
    head = values(2, 8, seed=5)
    places = {
        "first": write_adapter(tmp_path / "first", {name: pair(8, 8)}, {"score.weight": head}),
        "same": write_adapter(tmp_path / "same", {name: pair(8, 8)}, {"score.weight": head}),
        "other": write_adapter(tmp_path / "other", {name: pair(8, 8)}, {"score.weight": head + 1}),
        "without": write_adapter(tmp_path / "without", {name: pair(8, 8)}),
    }
    for second in ("same", "without"):
        merge_files(base, {places["first"]: 0.5, places[second]: 0.5}, tmp_path / f"with-{second}")
        assert same_bits(everything_in(tmp_path / f"with-{second}")["score.weight"], head)
    with pytest.raises(
        ValueError, match=r"`score\.weight` is in `.*first` in full, with other values than in `.*other`"
    ):
        merge_files(base, {places["first"]: 0.5, places["other"]: 0.5}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
