"""Whether a matrix is the one that a layer was quantized from: the library quantizes it again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.layers.quantized.formats import dequantized
from lightning_lora.layers.quantized.requantize import limit_of, quantized_again

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantized(matrix: torch.Tensor, kind: str) -> nn.Module:
    rows, columns = matrix.shape
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict({"weight": matrix})
    return layer.to("cpu")


def distance(layer: nn.Module, matrix: torch.Tensor) -> float:
    present = dequantized(layer)
    return float((quantized_again(layer, matrix) - present).norm() / present.norm())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_same_matrix_gives_the_same_weight_and_another_one_does_not(kind):
    torch.manual_seed(0)
    matrix = torch.randn(256, 512) * 0.02
    layer = quantized(matrix, kind)
    assert distance(layer, matrix) < 1e-6
    assert distance(layer, matrix.bfloat16()) < limit_of(layer)
    assert distance(layer, matrix + 0.01 * 0.02 * torch.randn_like(matrix)) > limit_of(layer)


def test_a_weight_that_is_not_quantized_yet_is_the_matrix_itself():
    """As before bitsandbytes' layers are moved to a device."""
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    matrix = layer.weight.data.clone()
    assert quantized_again(layer, matrix) is matrix and distance(layer, matrix) == 0
    assert distance(layer, matrix.bfloat16().float()) < limit_of(layer) < distance(layer, 1.02 * matrix)
