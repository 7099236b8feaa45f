"""A merge in files into dequantized weights is bit-identical to the same merge in memory."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, save_adapter
from lightning_lora.cli.diff import diff_files
from lightning_lora.cli.extract import extract
from lightning_lora.cli.main import main
from lightning_lora.cli.merge import merge_files
from lightning_lora.cli.plan import plan_files
from tests.helpers.on_disk import everything_in, write_base
from tests.helpers.oracles import same_bits

pytest.importorskip("bitsandbytes")
from tests.helpers.quantized import WideNet, eight_bits, four_bits

NF4 = {"quant_type": "nf4", "compress_statistics": True}
KINDS = {
    "nf4": NF4,
    "fp4 in bf16": {"quant_type": "fp4", "quant_storage": torch.bfloat16},
    "computes in bf16": {"compute_dtype": torch.bfloat16},
    "int8": None,
}


def adapted(kind: str = "nf4", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The blocks of :class:`WideNet` are quantized, and their first projections have trained adapters."""
    torch.manual_seed(0)
    model = WideNet().to(dtype)
    for block in model.layers:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, eight_bits(layer) if kind == "int8" else four_bits(layer, **KINDS[kind]))
    apply_lora(model, LoRAConfig(r=4, targets=["q"], seed=0))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, 0, 0.1)
    return model


def plain_base() -> dict[str, torch.Tensor]:
    """What :func:`adapted` quantizes."""
    torch.manual_seed(0)
    return WideNet().state_dict()


def without_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".lora." not in name}


def written(folder, model: nn.Module, shards: int = 1):
    """The quantized base and its adapter in files, as transformers writes the former."""
    compute = model.layers[0].q.compute_dtype if hasattr(model.layers[0].q, "compute_dtype") else torch.float32
    quantization = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": str(compute).removeprefix("torch.")}
    config = {"model_type": "wide", "quantization_config": quantization}
    save_adapter(model, folder / "adapter")
    return write_base(folder / "base", without_adapters(model), shards, config), folder / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_merge_in_memory(tmp_path, kind, dtype):
    model = adapted(kind, dtype)
    base, adapter = written(tmp_path, model)
    lost = merge_lora(model, dequantize=True)
    report = merge_files(base, adapter, tmp_path / "out", dequantize=True)
    merged, expected = everything_in(tmp_path / "out"), model.state_dict()
    assert merged.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same_bits(merged[name], value)] == []
    assert {name: report.layers[f"{name}.weight"].lost for name in lost} == pytest.approx(lost, rel=1e-4, abs=1e-12)
    assert report.written == sum(value.nbytes for value in expected.values())
    assert len(report.dequantized) == sum(isinstance(m, nn.Linear) for block in model.layers for m in block.modules())


@pytest.mark.slow
@pytest.mark.parametrize("slab", [100, 1 << 22])
def test_shards_their_index_and_the_configuration(tmp_path, monkeypatch, slab):
    """The parts of a weight may lie in another file than its codes."""
    monkeypatch.setattr("lightning_lora.files.safetensors.SLAB", slab)
    model = adapted()
    base, adapter = written(tmp_path, model, shards=3)
    merge_files(base, adapter, tmp_path / "out", dequantize=True)
    merge_lora(model, dequantize=True)
    merged, expected = everything_in(tmp_path / "out"), model.state_dict()
    assert all(same_bits(merged[name], value) for name, value in expected.items())
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "wide"}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())


def test_the_command(tmp_path, capsys):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    save_file(without_adapters(model), tmp_path / "base.safetensors")
    arguments = ["merge", *(str(tmp_path / name) for name in ("base.safetensors", "adapter", "out.safetensors"))]
    assert main(arguments) == 1
    assert "or give --dequantize" in capsys.readouterr().err
    assert main([*arguments, "--dequantize"]) == 0
    printed = capsys.readouterr().out
    assert "dequantized: 10 weights of the base" in printed and "only names and shapes were compared" in printed
    assert "test the merged model" not in printed
    merge_lora(model, dequantize=True)
    assert same_bits(load_file(tmp_path / "out.safetensors")["layers.1.q.weight"], model.layers[1].q.weight)


def test_a_bias_in_another_dtype_is_cast_as_its_layer(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.layers[0].q.bias.data = model.layers[0].q.bias.data.float()
    base, adapter = written(tmp_path, model)
    merge_files(base, adapter, tmp_path / "out", dequantize=True)
    merge_lora(model, dequantize=True)
    bias = everything_in(tmp_path / "out")["layers.0.q.bias"]
    assert bias.dtype == torch.bfloat16 and same_bits(bias, model.layers[0].q.bias)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_in_which_transformers_loads_the_model_counts(tmp_path, key):
    base, adapter = written(tmp_path, adapted())
    config = json.loads((base / "config.json").read_text()) | {key: "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    merge_files(base, adapter, tmp_path / "out", dequantize=True)
    merged = everything_in(tmp_path / "out")
    assert merged["layers.0.q.weight"].dtype == torch.bfloat16 and merged["up.weight"].dtype == torch.float32


def test_other_commands_read_the_dequantized_weights(tmp_path):
    """Codes were compared as numbers, no layer seemed to differ, and a plan had 1 x 2048 matrices."""
    base, adapter = written(tmp_path, adapted("computes in bf16"))
    merge_files(base, adapter, tmp_path / "out", dequantize=True)
    changed = {row.name for row in diff_files(base, tmp_path / "out").rows if row.changed()}
    assert changed == {f"layers.{i}.q.weight" for i in (0, 1)}
    assert extract(base, tmp_path / "out", tmp_path / "extracted", r=4).layers.keys() == {"layers.0.q", "layers.1.q"}
    save_file(everything_in(base), tmp_path / "quantized.safetensors")
    save_file(plain_base(), tmp_path / "plain.safetensors")
    plans = [plan_files(tmp_path / f"{kind}.safetensors", targets="all-linear") for kind in ("quantized", "plain")]
    assert plans[0].costs == plans[1].costs


def test_a_base_in_full_precision_has_nothing_to_dequantize(tmp_path):
    _, adapter = written(tmp_path, adapted())
    save_file(plain_base(), tmp_path / "plain.safetensors")
    with pytest.raises(
        ValueError, match=r"`--dequantize` is for a base that bitsandbytes quantized, and `.*` holds no"
    ):
        merge_files(tmp_path / "plain.safetensors", adapter, tmp_path / "out.safetensors", dequantize=True)
    merge_files(tmp_path / "plain.safetensors", adapter, tmp_path / "out.safetensors")


def test_a_configuration_without_a_dtype_to_compute_in_is_refused(tmp_path):
    base, adapter = written(tmp_path, adapted())
    (base / "config.json").write_text('{"quantization_config": {"bnb_4bit_compute_dtype": "half a float"}}')
    with pytest.raises(ValueError, match="must have a dtype as `bnb_4bit_compute_dtype`, but has `half a float`"):
        merge_files(base, adapter, tmp_path / "out", dequantize=True)


def test_a_conv1d_gets_its_transposed_weight(tmp_path):
    """As GPT-2's layers have one; that of the attention is fused, the other one is square."""
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D
    model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": conv1d(192, 64), "c_proj": conv1d(64, 64)})})
    for name, layer in list(model["attn"].items()):
        plain = nn.Linear(*layer.weight.shape)
        plain.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})
        model["attn"][name] = four_bits(plain)
        model["attn"][name].source_cls = conv1d
    tensors = copy.deepcopy(model.state_dict())
    apply_lora(model, LoRAConfig(r=4, targets=["c_attn", "c_proj"], seed=0))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, 0, 0.1)
    save_adapter(model, tmp_path / "adapter")
    base = write_base(tmp_path / "base", tensors, config={"model_type": "gpt2"})
    merge_files(base, tmp_path / "adapter", tmp_path / "out", dequantize=True)
    merge_lora(model, dequantize=True)
    merged = everything_in(tmp_path / "out")
    assert merged["attn.c_attn.weight"].shape == (64, 192)
    assert all(same_bits(merged[name], value) for name, value in model.state_dict().items())
    (base / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"`attn.c_attn.weight` may belong to an nn.Linear, or to a Conv1D.*config.json"
    ):
        merge_files(base, tmp_path / "adapter", tmp_path / "out2", dequantize=True)
