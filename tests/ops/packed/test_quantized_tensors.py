"""Linear layers on quantized tensors: forward is the library's, the gradient is that of the matrix it multiplies by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.linear import base_linear
from lightning_lora.ops.packed.quantized_tensors import (
    dequantized_tensor,
    is_quantized_tensor,
    quantized_linear,
    stored_tensors,
)
from tests.helpers.quantized_tensors import FORMATS, QUANTIZES_INPUT, matrix_of, quantize

DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 2e-2)}


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, dtype=dtype).requires_grad_(False)
    quantize(nn.Sequential(layer), kind)
    return layer


def relative(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_dequantized_matrix_is_what_the_library_multiplies_by(kind):
    layer = quantized(kind)
    assert is_quantized_tensor(layer.weight) and not is_quantized_tensor(nn.Linear(2, 2).weight)
    matrix = dequantized_tensor(layer.weight)
    assert type(matrix) is torch.Tensor and matrix.dtype == torch.float32 and not matrix.requires_grad
    assert relative(matrix, matrix_of(layer)) < (1e-2 if kind in QUANTIZES_INPUT else 1e-6)
    before = [stored.clone() for stored in stored_tensors(layer.weight)]
    matrix.zero_()
    assert all(map(torch.equal, before, stored_tensors(layer.weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_input_gets_the_gradient_of_the_dequantized_matrix(kind, dtype):
    dtype, tolerance = DTYPES[dtype]
    layer = quantized(kind, dtype)
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, 64, dtype=dtype)
    y = base_linear(x, layer.weight, layer.bias)
    assert torch.equal(y, F.linear(x.detach(), layer.weight, layer.bias))
    y.backward(dy)
    tolerance = 1e-2 + tolerance if kind in QUANTIZES_INPUT else tolerance
    assert relative(x.grad, dy.double() @ matrix_of(layer)) < tolerance


def test_the_library_alone_gives_no_gradient_of_a_quantized_input():
    layer = quantized("toy")
    x = torch.randn(5, 128, requires_grad=True)
    F.linear(x, layer.weight, layer.bias.requires_grad_()).sum().backward()
    assert x.grad is None and layer.bias.grad is not None


def test_factors_of_the_input_are_in_the_matrix():
    layer = quantized("int4-cpu")
    plain = dequantized_tensor(layer.weight)
    layer.weight.data.act_pre_scale = layer.weight.act_pre_scale = torch.linspace(1, 2, 128)
    torch.testing.assert_close(dequantized_tensor(layer.weight), plain * torch.linspace(1, 2, 128))


def test_the_second_derivative_and_the_gradient_of_a_bias():
    layer = quantized("toy")
    x, bias = torch.randn(5, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    y = quantized_linear(x, layer.weight, bias)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    dx.sum().backward()
    matrix = matrix_of(layer).float()
    torch.testing.assert_close(bias.grad, (2 * matrix.sum(1)).expand(5, -1).sum(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad, (2 * matrix.sum(1) @ matrix).expand(5, -1), rtol=2e-2, atol=2e-2)


def test_without_gradients_no_node_is_made_and_nothing_is_kept():
    layer = quantized("toy")
    assert quantized_linear(torch.randn(5, 128), layer.weight, layer.bias).grad_fn is None
    with torch.no_grad():
        assert quantized_linear(torch.randn(5, 128, requires_grad=True), layer.weight, None).grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        quantized_linear(torch.randn(5, 128, requires_grad=True), layer.weight, layer.bias)
    assert not saved


@pytest.mark.parametrize("kind", ["toy", "int8", "nf4"])
def test_two_quantized_weights_are_the_same_where_their_codes_and_scales_are(kind):
    first, second = quantized(kind), quantized(kind)
    assert same_bits(first.weight, second.weight)
    assert not same_bits(first.weight, nn.Linear(128, 64).weight)
    stored_tensors(second.weight)[-1].add_(1)
    assert not same_bits(first.weight, second.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not:DeprecationWarning")
@pytest.mark.parametrize("kind", ["toy", "int8", "float8"])
def test_a_compiler_takes_it_in_one_graph(kind):
    layer = quantized(kind)
    x = torch.randn(5, 128, requires_grad=True)
    compiled = torch.compile(lambda x: base_linear(x, layer.weight, layer.bias), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert relative(x.grad, matrix_of(layer).sum(0).expand(5, -1)) < 1e-2
