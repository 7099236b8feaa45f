"""Subspaces on architectures of transformers and timm: every parameter is read as a sum, and zero gives the base."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.subspace.method import SubspaceMethod
from tests.helpers import zoo
from tests.helpers.selection import slow_except

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]

TRANSFORMERS = [
    *("gpt2", "opt", "gpt_neox", "falcon", "bloom", "llama", "mixtral", "qwen3_moe", "llama4", "jetmoe", "mamba"),
    *("bert_classifier", "deberta_v3", "modernbert", "albert", "squeezebert", "mobilebert", "xlm", "fnet"),
    *("t5", "bart", "whisper", "vit", "swin", "convnext", "wavlm", "clip"),
]
FAST = ["gpt2", "mixtral", "bert_classifier", "t5", "wavlm", "mamba"]
TIMM = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "beit_base_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "swin_tiny_patch4_window7_224": (
        32,
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "mobilevit_xxs": (64, {}),
    "resnet18": (32, {}),
}
METHOD = SubspaceMethod(SubspaceConfig(dimension=10))


def check(model, output):
    """The start, a merge and an unmerge have the bits that they must have, and z gets a gradient."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        base = output(model)
        METHOD.complete(model)
        assert torch.equal(output(model), base)
        [(_, z)] = METHOD.added_parameters(model)
        z.copy_(torch.randn(10, generator=torch.Generator().manual_seed(0)))
    live = output(model)
    live.nan_to_num().square().sum().backward()
    assert z.grad.isfinite().all() and z.grad.all()
    values = {name: value.clone() for name, value in METHOD.merged_values(model)}
    plain.load_state_dict(values, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(output(plain), live.detach())  # every parameter that counts was read as the sum
        METHOD.merge(model)
        assert torch.equal(output(model), output(plain))
        METHOD.unmerge(model)
        METHOD.remove(model)
        assert torch.equal(output(model), base)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(FAST, TRANSFORMERS))
def test_transformers(name):
    model, inputs = zoo.build(zoo.CASES[name])
    check(model, lambda model: zoo.output(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    size, arguments = TIMM[name]
    with zoo.seeded():
        model = timm.create_model(name, num_classes=3, **arguments).eval()
        image = torch.randn(2, 3, size, size)
    check(model, lambda model: model(image))
