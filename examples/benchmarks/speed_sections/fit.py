"""What `fit` takes besides its steps: before the first one, for the merge, and for the teardown."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_lora import LoRACallback
from speed_sections.adapters import frozen_but
from speed_sections.bars import at_most
from speed_sections.comparison import heading
from speed_sections.decoders import EVERY, first_norm, llama, llama_shape
from speed_sections.lightning_runs import fit
from speed_sections.settings import Settings, compute_argument
from speed_sections.timing import clear, synchronize

STEPS = 3
PHASES = ("before the first step", "merge", "teardown")
PLAIN = "without a callback"


class Marks(Callback):
    """The times at which the hooks of this callback ran."""

    def __init__(self) -> None:
        self.first_batch = self.last_batch = self.fit_end = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.first_batch = now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last_batch = now()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.fit_end = now()


def now() -> float:
    synchronize()
    return time.perf_counter()


def phases(network: nn.Module, shape: tuple[int, int], callbacks: list[Callback]) -> dict[str, float]:
    """Seconds of each phase. The teardown moves the module to the CPU, which Lightning does without a callback too."""
    before, after = Marks(), Marks()
    ids = torch.randint(0, network.config.vocab_size, (STEPS, *shape))
    start = now()
    fit(network, loss, [ids], [before, *callbacks, after], precision="bf16-true")
    end = now()
    merge = after.fit_end - before.fit_end
    values = (after.first_batch - start, merge, end - after.last_batch - merge)
    return dict(zip(PHASES, values, strict=True))


def loss(network: nn.Module, ids: Tensor) -> Tensor:
    return network(input_ids=ids, labels=ids).loss


def measured(size: str, shape: tuple[int, int], settings: Settings) -> dict[str, dict[str, float]]:
    def plain() -> dict[str, float]:
        return phases(frozen_but(llama(size), first_norm), shape, [])

    def ours(compute: str) -> dict[str, float]:
        callback = LoRACallback(r=16, targets=EVERY, **compute_argument(compute, LoRACallback))
        return phases(llama(size), shape, [callback])

    rows = {}
    for name, run in {PLAIN: plain, **settings.ours(ours)}.items():
        phases(llama("tiny"), (1, 16), [LoRACallback(targets="all")])  # what happens once in a process is not counted
        rows[name] = run()
        clear()
    return rows


def table(title: str, rows: dict[str, dict[str, float]], settings: Settings) -> list[str]:
    lines = [*heading(title, settings.small), f"| | {', s | '.join(PHASES)}, s |", "|---" * 4 + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[phase]:.2f}' for phase in PHASES)} |")
    return [*lines, ""]


def fixed_cost(settings: Settings) -> list[str]:
    size, shape = llama_shape(settings)
    rows = measured(size, shape, settings)
    lines = table(f"Fixed cost of fit, shapes of Llama, {size}, r = 16 on all projections, bf16-true", rows, settings)
    for name in settings.names():
        for phase, bar in zip(PHASES, (0.5, 1.0, 1.0), strict=True):
            lines.append(at_most(f"{name}, {phase}, in s", rows[name][phase], bar))
    return lines


def fixed_cost_7b(settings: Settings) -> list[str]:
    size, shape = ("tiny", (1, 16)) if settings.small else ("7 B", (1, 512))
    rows = measured(size, shape, settings)
    lines = table(f"Fixed cost of fit, shapes of Llama, {size}, r = 16 on all projections, bf16-true", rows, settings)
    return [*lines, *(at_most(f"{name}, merge, in s", rows[name]["merge"], 5.0) for name in settings.names())]
