"""Bottlenecks on architectures of transformers and timm: each placement trains there, or is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.methods.bottleneck.config import PLACEMENTS, BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from tests.helpers import zoo
from tests.helpers.selection import slow_except

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]

NO_ATTENTION = "found no attention in"
NO_MLP = "found no MLP in"
NO_BLOCK = "found no module that holds the attention and the MLP of a block"
# By placement how many bottlenecks there are, or words of the reason: houlsby, pfeiffer, parallel, block.
TWO_LAYERS = (4, 2, 2, 2)
ENCODER_AND_DECODER = (10, 4, 4, 4)
TRANSFORMERS = {
    "gpt2": TWO_LAYERS,
    "opt": TWO_LAYERS,
    "gpt_neox": TWO_LAYERS,
    "falcon": TWO_LAYERS,
    "bloom": TWO_LAYERS,
    "llama": TWO_LAYERS,
    "mixtral": TWO_LAYERS,
    "qwen3_moe": TWO_LAYERS,
    "llama4": TWO_LAYERS,
    "jetmoe": ("holds the experts of attention", 2, 2, 2),
    "mamba": (NO_ATTENTION, NO_MLP, NO_MLP, NO_BLOCK),
    "bert_classifier": TWO_LAYERS,
    "deberta_v3": TWO_LAYERS,
    "modernbert": TWO_LAYERS,
    "albert": (2, 1, 1, 1),
    "squeezebert": ("no layer of its block has the name of an output projection", 2, 2, "but got a dict"),
    "mobilebert": (6, 4, 4, "has an attribute `bottleneck` of its own"),
    "xlm": (4, 2, 2, NO_BLOCK),
    "fnet": (NO_ATTENTION, 2, 2, NO_BLOCK),
    "t5": ENCODER_AND_DECODER,
    "bart": ENCODER_AND_DECODER,
    "whisper": ENCODER_AND_DECODER,
    "vit": TWO_LAYERS,
    "swin": TWO_LAYERS,
    "convnext": (NO_ATTENTION, 2, 2, NO_BLOCK),
    "wavlm": TWO_LAYERS,
    "clip": (8, 4, 4, 4),
}
FAST = ["gpt2", "squeezebert", "t5"]
TIMM = {
    "vit_tiny_patch16_224": (32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}, TWO_LAYERS),
    "deit3_small_patch16_224": (32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}, TWO_LAYERS),
    "beit_base_patch16_224": (32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}, TWO_LAYERS),
    "swin_tiny_patch4_window7_224": (
        32,
        {"window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
        TWO_LAYERS,
    ),
    "mobilevit_xxs": (64, {}, (18, 9, 9, 9)),
    "resnet18": (32, {}, (NO_ATTENTION, NO_MLP, NO_MLP, NO_BLOCK)),
}


def method(placement):
    return BottleneckMethod(BottleneckConfig(size=4, placement=placement))


def check(model, output, placement, expected):
    """The start has the base's bits and every bottleneck a gradient; or it is refused with the words of ``expected``.

    Args:
        model: frozen, as bits depend on it.
        output: gives a tensor for the model.
        placement: of the bottlenecks.
        expected: their number, or words of an error.
    """
    with torch.no_grad():
        base = output(model)
    if isinstance(expected, str):
        with pytest.raises((ValueError, TypeError)) as raised:
            method(placement).complete(model)
            output(model)
        assert expected in str(raised.value)
        return
    assert len(method(placement).complete(model)) == expected
    with torch.no_grad():
        assert torch.equal(output(model), base)
    output(model).nan_to_num().square().sum().backward()
    ups = [p for name, p in method(placement).added_parameters(model) if name.endswith(".up")]
    assert len(ups) == expected
    assert all(up.grad is not None and up.grad.any() for up in ups)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", slow_except(FAST, TRANSFORMERS))
def test_transformers(name, placement):
    model, inputs = zoo.build(zoo.CASES[name])
    expected = TRANSFORMERS[name][PLACEMENTS.index(placement)]
    check(model.requires_grad_(False), lambda model: zoo.output(model, inputs), placement, expected)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, placement):
    timm = pytest.importorskip("timm")
    size, arguments, expected = TIMM[name]
    if "patch_size" in arguments or "window_size" in arguments:
        arguments = {"img_size": size, **arguments}
    with zoo.seeded():
        model: nn.Module = timm.create_model(name, num_classes=3, **arguments).eval().requires_grad_(False)
        image = torch.randn(2, 3, size, size)
    check(model, lambda model: model(image), placement, expected[PLACEMENTS.index(placement)])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_with_a_cache(placement):
    model, inputs = zoo.build(zoo.CASES["llama"])
    method(placement).complete(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in method(placement).added_parameters(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        generated = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = model(generated.sequences).logits[:, 7:-1]  # of the whole sequence at once
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits, rtol=1e-4, atol=1e-4)
