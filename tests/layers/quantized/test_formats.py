"""The matrix that a quantized weight stands for, computed by the library that quantized it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora.layers.quantized.formats import dequantized, dequantized_int8, is_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")


def four_bits(rows: int = 96, columns: int = 128, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows)
    layer = bitsandbytes.nn.Linear4bit(columns, rows, **kwargs)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def by_the_library(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    state = copy.deepcopy(layer.weight.quant_state)
    state.dtype = dtype
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_four_bits(quant_type, double, storage, dtype):
    kwargs = {"quant_type": quant_type, "compress_statistics": double, "quant_storage": storage}
    layer = four_bits(compute_dtype=dtype, **kwargs)
    matrix = dequantized(layer)
    expected = by_the_library(layer, dtype or torch.float32)
    assert torch.equal(matrix, expected) and matrix.dtype == (dtype or torch.float32) and not matrix.requires_grad
    assert is_quantized(layer) and not is_quantized(nn.Linear(2, 2))


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_a_weight_packed_anew_for_evaluation_stands_for_nearly_the_same_matrix(storage):
    """The largest absolute values are rounded to bf16, which has 8 bits."""
    layer = four_bits(compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
    expected = dequantized(layer)
    functional = bitsandbytes.functional
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    torch.testing.assert_close(dequantized(layer), expected, rtol=2**-8, atol=0)


def test_a_weight_without_its_state_has_that_of_its_layer():
    layer = four_bits(quant_type="nf4")
    expected = dequantized(layer)
    layer.weight.quant_state = None
    assert torch.equal(dequantized(layer), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bits_in_a_half_dtype_are_rounded_once(dtype):
    torch.manual_seed(0)
    codes, largest = torch.randint(-127, 128, (5, 7), dtype=torch.int8), torch.rand(5)
    expected = (codes.float() * (largest * (1 / 127)).unsqueeze(1)).to(dtype)
    assert torch.equal(dequantized_int8(codes, largest, dtype), expected)


@pytest.mark.parametrize("called", [False, True])
def test_eight_bits(called):
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    weight = layer.weight.data.clone()
    layer.to("cpu")
    if called:
        layer(torch.randn(2, 64))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((dequantized(layer) - weight).abs() <= 0.57 * step).all()  # half a step, and the rounding to fp16


def test_eight_bits_made_of_a_weight_in_full_precision_at_each_call():
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu")
    layer(torch.randn(2, 64))
    matrix = dequantized(layer)
    assert torch.equal(matrix, layer.weight.float())
    assert matrix.data_ptr() != layer.weight.data_ptr() and not matrix.requires_grad
