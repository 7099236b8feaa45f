"""The example of a vision transformer, with a small network under timm's names and a few images."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import FusedBlocks

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
FEATURES = 8


class SmallViT(nn.Module):
    """Patches of 4 x 4, two blocks of attention, the mean and a head; with timm's names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, FEATURES, 4, 4)
        self.patch_embed.img_size = (size, size)
        self.blocks = FusedBlocks(FEATURES)
        self.head = nn.Linear(FEATURES, 10)

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, *self.patch_embed.img_size)
        return self.head(self.blocks(self.patch_embed(images).flatten(2).mT).mean(1))


def create_model(name: str, *, pretrained: bool = False, num_classes: int = 1000, img_size: int = 32, **_: int):
    return SmallViT(img_size)


def images(number: int) -> tuple[Tensor, Tensor]:
    """Bars of ten brightnesses."""
    labels = torch.arange(number) % 10
    return labels[:, None, None].expand(-1, 28, 28) / 10, labels


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    monkeypatch.delitem(sys.modules, "finetune_vit", raising=False)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    module = importlib.import_module("finetune_vit")
    monkeypatch.setattr(module, "images_and_labels", lambda package: [images(128), images(50)])
    return module


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--base-steps", "3"], ["--model", "a name on the hub"]])
def test_the_methods_train_what_their_names_say(example, monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["finetune_vit.py", "--steps", "3", *words])
    example.main()
    lines = capsys.readouterr().out
    assert ("% on MNIST" in lines) == ("--base-steps" in words)
    trained = {
        name: int(re.search(rf"{name} +[\d.]+ +([\d,]+)", lines)[1].replace(",", "")) for name in example.METHODS
    }
    head = 10 * FEATURES + 10
    qkv, proj = 8 * (FEATURES + 3 * FEATURES), 8 * (FEATURES + FEATURES)
    assert trained["linear probe"] == head
    assert trained["LoRA and the head"] == head + 2 * (qkv + proj)
    assert trained["full fine-tuning"] == sum(parameter.numel() for parameter in SmallViT(28).parameters())


def test_images_get_the_size_the_colours_and_the_range_that_the_model_takes(example):
    module = example.Classifier(SmallViT(size=56), 1e-3)
    shown = images(10)[0]
    enlarged = shown.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = module.model(torch.stack([enlarged] * 3, dim=1) * 2 - 1)
    torch.testing.assert_close(module(shown), expected)
