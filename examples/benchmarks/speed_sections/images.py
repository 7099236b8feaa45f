"""Image models of timm, of random weights, in bf16 with AdamW: ResNet-50 and ViT-L/16."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speed_sections.adapters import Case
from speed_sections.bars import at_least
from speed_sections.comparison import against, compare, never_slower, ours, share, table
from speed_sections.rows import PEFT_BF16, measure
from speed_sections.settings import DEVICE, Settings
from speed_sections.timing import Step
from speed_sections.training import drawn, training

CLASSES = 100
RESNET_TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
VIT_TINY = {"depth": 1, "embed_dim": 32, "num_heads": 4, "img_size": 32}
QV_ROW = ', targets="qv"'
SAME = 0.99  # of the speed: closer rows are the same, as windows differ by a per cent


def image_model(name: str, **arguments: Any) -> nn.Module:
    """Drawn in fp32, as a GPU has no bf16 version of timm's draw."""
    model = drawn(lambda: timm.create_model(name, num_classes=CLASSES, **arguments), torch.float32)
    return model.to(torch.bfloat16)


def image_step(batch: int, side: int, model: nn.Module, compiled: bool = False) -> Step:
    images = torch.randn(batch, 3, side, side, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(0, CLASSES, (batch,), device=DEVICE)

    def loss(call: nn.Module) -> Tensor:
        return F.cross_entropy(call(images).float(), labels)

    return training(loss, model, compiled)


def resnet(settings: Settings) -> list[str]:
    """Every convolution but the first, which trains in the bound; images in the format of most training scripts."""
    batch, side, shapes = (2, 32, RESNET_TINY) if settings.small else (128, 224, {})

    def make() -> nn.Module:
        return image_model("resnet50", **shapes).to(memory_format=torch.channels_last)

    convolutions = [key for key, module in make().named_modules() if isinstance(module, nn.Conv2d) and key != "conv1"]
    case = Case(make, lambda model: model.conv1.weight, partial(image_step, batch, side), convolutions, r=8)
    title = f"ResNet-50, {batch} images, r = 8 on all convolutions but the first, weights in channels_last"
    windows = settings.windows(7, 10)
    return compare(title, case.rows(settings), windows, settings, bar=0.85, aim=0.90, memory_of=[PEFT_BF16])


def vit(settings: Settings) -> list[str]:
    return attention("eager", settings, bar=0.89, aim=0.92)


def vit_compiled(settings: Settings) -> list[str]:
    """Compiling all 24 blocks of every row would take minutes; the share of a block in a step stays the same."""
    return attention("6 of its 24 blocks, torch.compile", settings, bar=0.86, aim=0.90, shapes={"depth": 6})


def attention(mode: str, settings: Settings, bar: float, aim: float, shapes: dict[str, Any] | None = None) -> list[str]:
    """The fused projection and the output of attention; and the preset that adapts a part of the fused one."""
    batch, side, shapes = (2, 32, VIT_TINY) if settings.small else (64, 224, shapes or {})
    case = Case(
        partial(image_model, "vit_large_patch16_224", **shapes),
        lambda model: model.blocks[0].norm1.weight,
        partial(image_step, batch, side, compiled="compile" in mode),
        ["attn.qkv", "attn.proj"],
        r=16,
    )
    starts = {**case.rows(settings), **case.ours(settings, QV_ROW, targets="qv")}
    rows = measure(starts, settings.windows(7, 6), settings)
    lines = table(f"ViT-L/16, {batch} images, r = 16 on attention, {mode}", rows, settings)
    for row in ours(rows):
        if row.endswith(QV_ROW):
            both = row.removesuffix(QV_ROW)
            lines.append(at_least(f"{row}, speed over that with both layers", against(rows, both, row), SAME))
        else:
            lines.append(at_least(f"{row}, share of the bound's speed", share(rows, row), bar, aim))
            lines += never_slower(rows, row)
    return lines
