"""A mixed batch in tiny models of many architectures: each sample as that sample alone, or a refusal by name."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, use_adapters
from tests.helpers import zoo
from tests.helpers.selection import slow_except

pytest.importorskip("transformers")
EQUAL = ["llama", "mixtral", "vit", "t5", "gpt2", "gpt_neox", "bert_masked", "whisper", "clip", "esm", "gpt_oss"]
REFUSED = {
    "swin": r"`swin.encoder.layers.0.blocks.0.attention.\S+` gets an input of shape",  # windows
    "opt": r"`model.decoder.layers.0.fc1` gets an input of shape \(16, 32\)",  # flattened tokens
    "switch_transformers": r"`encoder.block.1.layer.1.mlp.experts.expert_\d.wi` gets an input",  # routed tokens
    "mamba": r"`backbone.layers.0.mixer.x_proj` computes with its weight",  # read by a kernel
    "llama4": r"`model.layers.1.feed_forward.experts` computes with its weight",  # copies of the tokens
}


def several(name):
    model, inputs = zoo.build(zoo.CASES[name])
    for adapter, r in {"fr": 2, "de": 1, "idle": 1}.items():
        apply_lora(model, LoRAConfig(name=adapter, r=r, targets="all"))
    torch.manual_seed(7)
    for _, parameter in lora_parameters(model):
        parameter.data = 0.2 * torch.randn(parameter.shape)
    return model, inputs


def outputs(model, inputs, choice):
    """Every output that has the batch first; a table of images and texts mixes the samples."""
    with use_adapters(model, choice), zoo.seeded():
        found = list(zoo.floats(model(**inputs)))
    return [y for y in found if y.dim() and len(y) == 2 and y.shape != (2, 2)]


def gradients(model, loss):
    names, parameters = zip(*lora_parameters(model), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", slow_except(EQUAL[:4], EQUAL))
def test_each_sample_is_that_sample_alone(name):
    model, inputs = several(name)
    mixed = outputs(model, inputs, ["fr", "de"])
    alone = [outputs(model, inputs, adapter) for adapter in ("fr", "de")]
    together = [torch.stack([fr[0], de[1]]) for fr, de in zip(*alone, strict=True)]
    assert mixed and any(not torch.allclose(fr, de) for fr, de in zip(*alone, strict=True))
    for y, expected in zip(mixed, together, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    found = gradients(model, sum(y.square().sum() for y in mixed))
    expected = gradients(model, sum(y.square().sum() for y in together))
    for key, gradient in expected.items():
        if found[key] is None:
            assert gradient is None or not gradient.any(), key
        else:
            assert "idle" not in key
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * max(1, float(gradient.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(["swin", "opt"], REFUSED))
def test_what_cannot_choose_by_sample_is_refused_by_name(name):
    model, inputs = several(name)
    assert outputs(model, inputs, "fr")
    with pytest.raises(ValueError, match=REFUSED[name]):
        outputs(model, inputs, ["fr", "de"])
