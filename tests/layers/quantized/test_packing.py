"""A 4-bit base on a CPU whose evaluations pack the weights: training goes on after them with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TuneConfig, adapt, apply_lora, lora_parameters, remove_adapted, remove_lora
from lightning_lora.layers.quantized.formats import dequantized

bitsandbytes = pytest.importorskip("bitsandbytes")

from tests.helpers.quantized import four_bits  # noqa: E402

pytestmark = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 alone"
)


def model_of(**kwargs: object) -> nn.Module:
    """An adapted layer behind a quantized one that is not adapted, whose gradient it needs."""
    torch.manual_seed(0)
    return nn.Sequential(*(four_bits(nn.Linear(128, 128), **kwargs) for _ in range(3)))


def evaluated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train()
    return y


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [dequantized(layer) for layer in model]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_after_an_evaluation_has_the_gradients_of_the_dequantized_weights(double, bias):
    model = model_of(compress_statistics=double)
    if not bias:
        for layer in model:
            layer.bias = None
    weights = [weight.double() for weight in weights_of(model)]
    apply_lora(model, LoRAConfig(r=4, targets=["0"]))
    A, B = (parameter for _, parameter in lora_parameters(model))
    nn.init.normal_(B)
    x = torch.randn(5, 128)
    evaluated(model, x)
    model.state_dict()
    (model(x) ** 2).sum().backward()

    copies = [parameter.detach().double().requires_grad_() for parameter in (A, B)]
    biases = [layer.bias.detach().double() if bias else None for layer in model]
    y = nn.functional.linear(x.double(), weights[0] + copies[1] @ copies[0], biases[0])
    for weight, b in zip(weights[1:], biases[1:], strict=True):
        y = nn.functional.linear(y, weight, b)
    (y**2).sum().backward()
    for parameter, expected in zip((A, B), copies, strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(now.double(), before) for now, before in zip(weights_of(model), weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_base_that_was_evaluated_before_it_was_adapted_is_unpacked(double, storage, saved):
    model = model_of(compress_statistics=double, quant_storage=storage)
    weights, x = weights_of(model), torch.randn(5, 128)
    evaluated(model, x)
    if saved:
        model.state_dict()  # which bitsandbytes writes in the form for training
    with pytest.warns(UserWarning, match="of the model ran in evaluation"):
        apply_lora(model, LoRAConfig(r=4, targets="all"))
    for now, before, layer in zip(weights_of(model), weights, model, strict=True):
        torch.testing.assert_close(now, before, rtol=2**-8, atol=2e-3 if saved and double else 0)
        assert layer.weight.dtype == storage and layer.weight.shape == (128 * 64 // storage.itemsize, 1)
    expected = x
    for weight, layer in zip(weights_of(model), model, strict=True):
        expected = nn.functional.linear(expected, weight, layer.bias)
    torch.testing.assert_close(model(x), expected)


def test_a_model_without_adapters_packs_again():
    for method, remove in ((LoRAConfig(r=4, targets=["0"]), remove_lora), (TuneConfig("bias"), remove_adapted)):
        model, x = model_of(), torch.randn(5, 128)
        plain = evaluated(copy.deepcopy(model), x)
        adapt(model, method)
        assert not torch.equal(evaluated(model, x), plain)
        remove(model)
        assert torch.equal(evaluated(model, x), plain)
