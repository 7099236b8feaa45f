"""Quantized weights in files: their matrices, against those of the layers, and parts that do not fit each other."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora.cli.quantized_weights import is_quantized_in, quantized_weights
from lightning_lora.files.weights import open_weights
from lightning_lora.layers.quantized.formats import dequantized

pytest.importorskip("bitsandbytes")
from tests.helpers.quantized import eight_bits, four_bits

FORMATS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4 in bf16": {"quant_type": "fp4", "quant_storage": torch.bfloat16},
    "computes in bf16": {"compute_dtype": torch.bfloat16},
}


def layer(kind: str = "nested") -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(128, 96)
    return eight_bits(plain) if kind == "int8" else four_bits(plain, **FORMATS[kind])


def saved(folder, tensors):
    save_file(tensors, folder / "base.safetensors")
    return open_weights(folder / "base.safetensors")


@pytest.mark.parametrize("kind", [*FORMATS, "int8"])
def test_the_matrix_of_a_file_is_that_of_the_layer(tmp_path, kind):
    model = nn.ModuleDict({"q": layer(kind), "head": nn.Linear(4, 2)})
    base = saved(tmp_path, model.state_dict())
    [weight] = quantized_weights(base, getattr(model["q"], "compute_dtype", None) or torch.float32)
    expected = dequantized(model["q"])
    assert weight.name == "q.weight" and weight.shape == (96, 128)
    for rows in (slice(0, 96), slice(1, 90)):
        matrix = weight.load()(rows)
        assert matrix.dtype == torch.float32 and torch.equal(matrix, expected[rows].float())
    assert {weight.name, *weight.parts, "q.bias", "head.weight", "head.bias"} == base.tensors.keys()
    assert is_quantized_in("q.weight", base) and not is_quantized_in("head.weight", base)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("nested", {".weight.absmax": torch.zeros(5, dtype=torch.uint8)}, "absmax has 5 numbers of U8, and needs 192"),
        ("nested", {".weight": torch.zeros(5, 1, dtype=torch.uint8)}, "there are 5 bytes of codes for 12288 numbers"),
        ("nested", {".weight.quant_map": None}, "quant_map"),
        ("nested", {".weight.nested_quant_map": torch.zeros(9)}, "nested_quant_map has 9 numbers of F32"),
        ("nested", {".weight.quant_state.bitsandbytes__nf4": torch.tensor([65, 66], dtype=torch.uint8)}, "Expecting"),
        (
            "nested",
            {".weight.quant_state.bitsandbytes__nf4": torch.zeros(20_000, dtype=torch.uint8)},
            "has 20,000 bytes",
        ),
        ("int8", {".SCB": torch.zeros(3)}, r"SCB has shape \(3,\) and F32 for 96 rows"),
        ("int8", {".weight_format": torch.tensor(2, dtype=torch.uint8)}, "an order of early releases of bitsandbytes"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, kind, change, words):
    tensors = nn.ModuleDict({"q": layer(kind)}).state_dict() | {f"q{part}": value for part, value in change.items()}
    base = saved(tmp_path, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(ValueError, match=rf"`q.weight` of .* is quantized, and its parts do not fit.*{words}"):
        quantized_weights(base, torch.float32)
