"""Parts of architectures of transformers and timm train, or are refused with a reason; counts are counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import TuneConfig, adapt, remove_adapted
from tests.helpers import zoo
from tests.helpers.interrupts import state_of
from tests.helpers.selection import slow_except

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]
PARTS = ("bias", "norm", "head")
NO_BIAS = "found no bias in"
# For each part the number of parameters that train, or the head, or words of the reason.
TRANSFORMERS = {
    "gpt2": (13, 10, "lm_head"),
    "opt": (16, 8, "lm_head"),
    "gpt_neox": (13, 10, "lm_head"),
    "falcon": (3, 6, "lm_head"),
    "bloom": (14, 12, "lm_head"),
    "llama": (NO_BIAS, 5, "lm_head"),
    "gemma2": (NO_BIAS, 9, "lm_head"),
    "mixtral": (NO_BIAS, 5, "lm_head"),
    "qwen3_moe": (NO_BIAS, 9, "lm_head"),
    "mamba": (4, 3, "lm_head"),
    "rwkv": (6, 12, "head"),
    "bert_classifier": (19, 10, "classifier"),
    "deberta_v3": (21, 12, "classifier"),
    "modernbert": (1, 6, "found 2 output heads in ModernBertForMaskedLM: `head.dense`, `decoder`."),
    "albert": (13, 8, "predictions.decoder"),
    "electra": (19, 10, "classifier"),
    "distilbert": (20, 12, "vocab_projector"),
    "t5": (NO_BIAS, 12, "lm_head"),
    "bart": (44, 24, "lm_head"),
    "whisper": (40, 24, "proj_out"),
    "vit": (19, 10, "classifier"),
    "swin": (21, 14, "classifier"),
    "dinov2": (19, 10, "classifier"),
    "resnet": (8, 14, "classifier.1"),
    "clip": (35, 22, "found 2 output heads in CLIPModel: `visual_projection`, `text_projection`."),
    "wav2vec2": (22, 14, "lm_head"),
}
TIMM = {
    "vit_tiny_patch16_224": (75, 50, "head"),
    "swin_tiny_patch4_window7_224": (79, 58, "head.fc"),
    "convnext_atto": (58, 34, "head.fc"),
    "mixer_s32_224": (51, 34, "head"),
    "resnet18": (21, 40, "fc"),
    "efficientnet_b0": (82, 98, "classifier"),
}


def check(model, output, part, expected):
    """What trains has gradients, and leaves no trace when it is removed; or it is refused with the words."""
    before = state_of(model)
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(ValueError) as raised:
            adapt(model, TuneConfig(part))
        assert expected in str(raised.value)
    else:
        adapt(model, TuneConfig(part))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if part == "head":
            assert {name.rpartition(".")[0] for name in trained} <= {expected, *tied(model, expected)}
        else:
            assert len(trained) == expected
        output(model).nan_to_num().square().sum().backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        model.zero_grad()
        remove_adapted(model)
    assert state_of(model) == before


def tied(model: nn.Module, head: str) -> set[str]:
    own = {id(parameter) for parameter in model.get_submodule(head).parameters()}
    return {name.rpartition(".")[0] for name, parameter in model.named_parameters() if id(parameter) in own}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", slow_except(("gpt2", "llama", "bert_classifier", "resnet"), TRANSFORMERS))
def test_transformers(name, part):
    model, inputs = zoo.build(zoo.CASES[name])
    check(model, lambda model: zoo.output(model, inputs), part, TRANSFORMERS[name][PARTS.index(part)])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, part):
    timm = pytest.importorskip("timm")
    with zoo.seeded():
        model: nn.Module = timm.create_model(name, num_classes=3).eval()
        image = torch.randn(1, 3, 224, 224)
    check(model, lambda model: model(image), part, TIMM[name][PARTS.index(part)])
