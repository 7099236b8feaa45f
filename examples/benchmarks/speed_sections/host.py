"""Host time of an adapted layer above the frozen one, against peft's: Python and launches, without a GPU.

The tensors are so small that their arithmetic takes no time, and torch has one thread. An op for GPUs asks for the type
of the device, so the CPU is added to what it takes. On a busy machine other processes only add time, so the least time
of several windows counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig
from speed_sections.adapters import adapted, adapted_by_peft
from speed_sections.bars import at_most
from speed_sections.comparison import heading
from speed_sections.settings import Settings, Windows
from speed_sections.timing import Step, in_turns, threads

OPS_FOR_GPUS = ("lightning_lora.ops.fused_linear", "lightning_lora.ops.linear", "lightning_lora.ops.dispatch")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FROZEN, PEFT = "frozen", "peft, bf16 adapters"


class Block(nn.Module):
    """Six projections that read and share their inputs as in a decoder, with no attention between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))
        return x + self.down_proj(self.up_proj(x).relu())


@dataclass(frozen=True)
class HostCase:
    """A setting of the section, and the greatest share of peft's time above the frozen layer."""

    title: str
    bar: float
    checkpointed: bool = False
    dropout: float = 0.0


CASES = (
    HostCase("plain", 0.5),
    HostCase("checkpointed", 0.5, checkpointed=True),
    HostCase("dropout 0.1", 0.7, dropout=0.1),
)


@contextmanager
def paths_of_gpus() -> Iterator[list[str]]:
    """Let the ops for GPUs take tensors of the CPU; the value lists the modules that have such a limit."""
    modules = []
    for name in OPS_FOR_GPUS:
        module = importlib.import_module(name)
        if hasattr(module, "DEVICES"):
            modules.append((module, module.DEVICES))
            module.DEVICES = ("cuda", "cpu")
    try:
        yield [module.__name__ for module, _ in modules]
    finally:
        for module, devices in modules:
            module.DEVICES = devices


def models(blocks: int, dropout: float, settings: Settings) -> dict[str, nn.Module]:
    def base() -> nn.Module:
        return nn.Sequential(*(Block(32) for _ in range(blocks))).to(torch.bfloat16)

    def ours(compute: str) -> nn.Module:
        return adapted(base(), LoRAConfig(r=8, targets=PROJECTIONS, dropout=dropout), compute)

    by_peft = adapted_by_peft(base(), PROJECTIONS, 8, dropout)
    made = {name: make() for name, make in settings.ours(ours).items()}
    return {FROZEN: base().requires_grad_(False), PEFT: by_peft, **made}


def step_of(model: nn.Module, checkpointed: bool) -> Step:
    """Forward and backward, and the gradients let go, as an optimizer's ``zero_grad`` does."""
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    call: Callable[[Tensor], Tensor] = model.train()
    if checkpointed:
        call = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731

    def step() -> None:
        call(x).sum().backward()
        for parameter in trained:
            parameter.grad = None

    return step


def microseconds(case: HostCase, settings: Settings) -> dict[str, float]:
    """Of each layer, forward and backward."""
    blocks, windows = (1, Windows(2, 1)) if settings.tiny else (6, Windows(15, 12))
    steps = {name: step_of(model, case.checkpointed) for name, model in models(blocks, case.dropout, settings).items()}
    for step in steps.values():
        for _ in range(4):
            step()
    times = in_turns(steps, windows, summary=min)
    return {name: ms * 1000 / (blocks * len(PROJECTIONS)) for name, ms in times.items()}


def host(settings: Settings) -> list[str]:
    with threads(1), paths_of_gpus() as forced:
        times = {case: microseconds(case, settings) for case in CASES}
    rows = list(times[CASES[0]])
    lines = [*heading("Host time of a layer in us, forward and backward: CPU, one thread, r = 8", settings.tiny)]
    lines += [f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {case.title} | {' | '.join(f'{us[name]:.0f}' for name in rows)} |" for case, us in times.items()]
    lines += ["", f"Ops for GPUs that ran on the CPU: {', '.join(forced) or 'none'}.", ""]
    for case, us in times.items():
        above = {name: value - us[FROZEN] for name, value in us.items()}
        for name in settings.names():
            lines.append(
                at_most(f"{name}, {case.title}, time above frozen over peft's", above[name] / above[PEFT], case.bar)
            )
    return lines
