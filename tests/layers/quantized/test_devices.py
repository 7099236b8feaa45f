"""An 8-bit layer computes on the device of its input, wherever the model was before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, remove_lora
from lightning_lora.layers.quantized.devices import FollowInput

bitsandbytes = pytest.importorskip("bitsandbytes")


def model_of() -> nn.Sequential:
    """An adapted layer and one that is not."""
    torch.manual_seed(0)
    model = nn.Sequential(*(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False) for _ in range(2)))
    return model.to("cpu")


@pytest.mark.parametrize("called", [False, True])
def test_codes_and_scales_go_to_the_device_of_the_input(called):
    model, x = model_of(), torch.randn(3, 64)
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    expected = model(x).detach() if called else None
    for layer in model:
        owner = layer.state if called else layer.weight
        (hook,) = layer._forward_pre_hooks.values()
        codes = owner.CB.clone()
        hook(layer, (x.to("meta"),))
        assert owner.CB.is_meta and owner.SCB.is_meta
        owner.CB, owner.SCB = codes, codes.new_ones(64, dtype=torch.float32)
        hook(layer, (x,))
        assert owner.CB is codes  # nothing moves where it is
    assert expected is None or expected.shape == (3, 64)


def test_the_hooks_go_with_the_adapters():
    model = model_of()
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    apply_lora(model, LoRAConfig(r=2, targets=["1"], name="other"))
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 1]
    assert all(isinstance(hook, FollowInput) for layer in model for hook in layer._forward_pre_hooks.values())
    remove_lora(model)
    assert not any(layer._forward_pre_hooks for layer in model)


@pytest.mark.parametrize("training", [True, False])
def test_backward_in_evaluation_with_outliers_in_fp16(training):
    """transformers loads 8-bit layers with this threshold. The layers share an input that another operation saves."""
    torch.manual_seed(0)
    q, k = (bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0) for _ in range(2))
    model = nn.ModuleDict({"q": q, "k": k}).to("cpu")
    apply_lora(model, LoRAConfig(r=2, targets=["q"], seed=0))
    model.train(training)
    nn.init.ones_(q.lora.default.B)
    x = torch.randn(5, 64)
    x[0, 3] = 20.0
    before, h = x.half().relu(), x.half().requires_grad_()
    saved = h.relu()
    (q(saved) + k(saved)).sum().backward()
    assert torch.equal(saved, before) and h.grad is not None
    # scale * (the sum of B's columns) * the sum of x
    expected = q.lora.default.scale * q.lora.default.B.sum(0)[:, None] * saved.detach().float().sum(0)
    torch.testing.assert_close(q.lora.default.A.grad, expected, rtol=2e-3, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves a model between a CPU and a GPU")
def test_a_model_that_goes_to_the_gpu_and_back_computes_there():
    model, x = model_of(), torch.randn(3, 64)
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    first = model(x).detach()
    for device in ("cuda", "cpu", "cuda", "cpu"):
        y = model.to(device)(x.to(device)).detach().cpu()
        torch.testing.assert_close(y, first, rtol=0.05, atol=0.05)
    assert torch.equal(y, first)
