"""Single layers in bf16, forward and backward: an embedding, linear layers and a convolution, r = 16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig
from speed_sections.adapters import adapted, adapted_by_peft
from speed_sections.bars import at_most
from speed_sections.comparison import heading
from speed_sections.rows import PEFT_BF16, PEFT_FP32
from speed_sections.settings import DEVICE, Settings
from speed_sections.timing import Step, clear, in_turns

FROZEN = "frozen"
R = 16


@dataclass(frozen=True)
class Layer:
    """A layer and its input."""

    title: str
    make: Callable[[], nn.Module]
    x: Tensor
    dropout: float = 0.0

    def base(self) -> nn.Module:
        return nn.Sequential(self.make()).to(DEVICE, torch.bfloat16).requires_grad_(False)

    def by_peft(self, fp32: bool) -> nn.Module:
        return adapted_by_peft(self.base(), ["0"], R, self.dropout, fp32)

    def steps(self, settings: Settings) -> dict[str, Step]:
        config = LoRAConfig(r=R, targets=["0"], dropout=self.dropout)
        ours = settings.ours(lambda compute: adapted(self.base(), config, compute))
        models = {FROZEN: self.base(), PEFT_BF16: self.by_peft(False), PEFT_FP32: self.by_peft(True)}
        models |= {name: make() for name, make in ours.items()}
        return {name: layer_step(model, self.x) for name, model in models.items()}


def layer_step(layer: nn.Module, x: Tensor) -> Step:
    """Gradients of the input and of A and B; a frozen embedding has neither, and only runs forward."""
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    gradient = torch.randn_like(layer(x).detach())
    return lambda: torch.autograd.grad(layer(x), inputs, gradient) if inputs else layer(x)


def measured(layer: Layer, settings: Settings, steps: int) -> dict[str, float]:
    """Milliseconds by row."""
    clear()
    rows = layer.steps(settings)
    for step in rows.values():
        for _ in range(3):
            step()
    return in_turns(rows, settings.windows(9, steps))


def embedding(settings: Settings) -> list[str]:
    count, width, batch, length = (320, 40, 2, 10) if settings.small else (32000, 4096, 8, 1024)
    ids = torch.randint(0, count, (batch, length), device=DEVICE)
    title = f"Embedding {count} x {width}, {batch} x {length} ids, r = {R}"
    times = measured(Layer(title, lambda: nn.Embedding(count, width), ids), settings, 100)
    above = {name: (ms - times[FROZEN]) * 1000 for name, ms in times.items()}
    lines = [*heading(title, settings.small), "| | us | us above the frozen layer |", "|---|---|---|"]
    lines += [f"| {name} | {ms * 1000:.0f} | {above[name]:.0f} |" for name, ms in times.items()]
    better = faster_peft(times)
    for name in settings.names():
        ratio = above[name] / above[better]
        lines += ["", at_most(f"{name}, time above frozen over that of {better}", ratio, 0.6)]
    return lines


def faster_peft(times: dict[str, float]) -> str:
    return min((PEFT_BF16, PEFT_FP32), key=times.__getitem__)


def layers(settings: Settings) -> list[str]:
    cases = linear_layers(8192, 4096, 14336) if not settings.small else linear_layers(64, 64, 224)
    images, side = (32, 56) if not settings.small else (2, 14)
    x = torch.randn(images, 64, side, side, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    title = f"Conv2d 64 -> 128, 3 x 3, {images} images of {side} x {side}"
    cases.append(Layer(title, lambda: nn.Conv2d(64, 128, 3, padding=1), x))
    times = {case.title: measured(case, settings, 20) for case in cases}
    rows = [name for name in next(iter(times.values())) if name != FROZEN]
    lines = heading(f"One layer, forward and backward, r = {R}: time over that of the frozen layer", settings.small)
    lines += [f"| | frozen ms | {' | '.join(rows)} |", "|---" * (len(rows) + 2) + "|"]
    bars = [""]
    for title, ms in times.items():
        ratios = " | ".join(f"{ms[row] / ms[FROZEN]:.3f}x" for row in rows)
        lines.append(f"| {title} | {ms[FROZEN]:.3f} | {ratios} |")
        better = faster_peft(ms)
        for name in settings.names():
            bars.append(at_most(f"{name}, {title}, time over that of {better}", ms[name] / ms[better], 1.0))
    return [*lines, *bars]


def linear_layers(rows: int, narrow: int, wide: int) -> list[Layer]:
    def tokens(features: int) -> Tensor:
        return torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    square, up, down = (
        lambda: nn.Linear(narrow, narrow, bias=False),
        lambda: nn.Linear(narrow, wide, bias=False),
        lambda: nn.Linear(wide, narrow),
    )
    return [
        Layer(f"Linear {narrow} -> {narrow}, {rows} rows", square, tokens(narrow)),
        Layer(f"Linear {narrow} -> {wide}", up, tokens(narrow)),
        Layer(f"Linear {narrow} -> {wide}, dropout 0.1", up, tokens(narrow), 0.1),
        Layer(f"Linear {wide} -> {narrow}, bias", down, tokens(wide)),
    ]
