"""Small models in fp32 through Lightning: nn.MultiheadAttention, a recurrent layer, and both in a forecasting model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRACallback
from speed_sections.adapters import adapted_by_peft, frozen_but
from speed_sections.bars import at_least
from speed_sections.comparison import against, ours, table
from speed_sections.lightning_runs import fit
from speed_sections.rows import BOUND, FULL, PEFT_FP32, Row, Rows, describe
from speed_sections.settings import Settings, Windows, compute_argument
from speed_sections.small_models import Encoder, FusionTransformer, Recurrent
from speed_sections.timing import clear, synchronize

WARM = 10  # steps before the windows: in the first ones the callback watches gradients
R = 8


@dataclass(frozen=True)
class Small:
    """A model and its data.

    Args:
        title: of its table.
        make: the network, on the CPU.
        x: shape of the inputs of a batch.
        y: shape of the values to predict.
        targets: what gets adapters.
        lowest: name of the parameter that trains in the bound.
        in_peft: the same layers in peft's words; ``None`` where peft has no adapter for one of them.
    """

    title: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    y: tuple[int, ...]
    targets: list[str] | str
    lowest: str
    in_peft: list[str] | None = None


class Clock(Callback):
    """Milliseconds of each step of the windows."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.times = windows, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.is_edge(batch_idx):
            synchronize()
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM and self.is_edge(batch_idx + 1):
            synchronize()
            self.times.append((time.perf_counter() - self.start) / self.windows.steps * 1000)

    def is_edge(self, index: int) -> bool:
        return index >= WARM and (index - WARM) % self.windows.steps == 0


def models(small: bool) -> list[Small]:
    """Sizes at which launches and Python decide, as in most projects of this kind."""
    features, width, depth = (8, 16, 2) if small else (64, 256, 6)
    batch, length, horizon = (2, 12, 4) if small else (64, 96, 24)
    variables, heads = 8, 4
    return [
        Small(
            f"Encoder, nn.MultiheadAttention, {depth} layers of {width}",
            partial(Encoder, features, width, heads, depth),
            (batch, length, features),
            (batch, 1),
            "all",
            "embed.bias",
            ["self_attn", "linear1", "linear2", "embed"],
        ),
        Small(
            f"nn.LSTM, 2 layers of {width}",
            partial(Recurrent, features, width, 2),
            (batch, length, features),
            (batch, 1),
            ["lstm"],
            "lstm.bias_ih_l0",
        ),
        Small(
            f"Small temporal fusion transformer, {variables} variables, width {width // 4}",
            partial(FusionTransformer, variables, width // 4, heads, horizon),
            (batch, length, variables),
            (batch, horizon, 1),
            ["all", "lstm"],
            "select.embed.0.bias",
        ),
    ]


def small(settings: Settings) -> list[str]:
    """The bound of an LSTM has no gain: cuDNN computes the gradients of all weights or of none."""
    windows = settings.windows(4, 20)
    lines = []
    for model in models(settings.small):
        rows = measured(model, settings, windows, rounds=1 if settings.small else 3)
        lines += table(f"{model.title}, batch {model.x[0]}, r = {R}, fp32, through Lightning", rows, settings)
        lines += [
            at_least(f"{name}, speed over that of full fine-tuning", against(rows, FULL, name), 1.0)
            for name in ours(rows)
        ]
        lines.append("")
    return lines


def measured(model: Small, settings: Settings, windows: Windows, rounds: int) -> Rows:
    """Runs in turns, each on a new model; the median over the windows of all rounds."""

    def lowest(network: nn.Module) -> nn.Parameter:
        return network.get_parameter(model.lowest)

    runs: dict[str, Callable[[], list[float]]] = {
        BOUND: lambda: times(model, frozen_but(model.make(), lowest), windows),
        FULL: lambda: times(model, model.make(), windows),
    }
    if model.in_peft is not None:
        runs[PEFT_FP32] = lambda: times(model, adapted_by_peft(model.make(), model.in_peft, R), windows)
    runs |= settings.ours(lambda compute: times(model, model.make(), windows, callback(model, compute)))
    every: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            try:
                every[name] += run()
            except Exception as error:  # the other rows are worth their time
                failures[name] = describe(error)
            clear()
    return {
        name: Row(failure=failures[name]) if name in failures else Row(ms=statistics.median(values))
        for name, values in every.items()
    }


def times(model: Small, network: nn.Module, windows: Windows, *callbacks: Callback) -> list[float]:
    """Milliseconds of a step, one value a window."""
    steps = WARM + windows.rounds * windows.steps
    torch.manual_seed(0)
    batches = [torch.randn(shape).expand(steps, *shape) for shape in (model.x, model.y)]
    clock = Clock(windows)
    fit(network, lambda call, x, y: F.mse_loss(call(x), y), batches, [*callbacks, clock])
    return clock.times


def callback(model: Small, compute: str) -> Callback:
    return LoRACallback(r=R, targets=model.targets, merge=False, **compute_argument(compute, LoRACallback))
