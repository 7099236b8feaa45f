"""One linear layer and a mixed batch: the ways to compute it, each timed, so that the rule between them has a reason.

``grouped`` is torch's product of sorted groups, which needs a batch sorted by adapter; ``grouped, sorting`` sorts it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.fused_linear import fused_linear
from lightning_lora.ops.mixed_linear import is_stacked, mixed_linear
from lightning_lora.ops.mixed_products import BySample, Stacked
from lightning_lora.ops.mixture import Mixture
from speed_sections.bars import at_most
from speed_sections.comparison import heading
from speed_sections.settings import DEVICE, OURS, Settings, Windows
from speed_sections.timing import Step, clear, in_turns

R = 16
FROZEN, ONE = "frozen", "one adapter"


@dataclass(frozen=True)
class Sizes:
    """A linear layer, and a batch for it."""

    inside: int
    outside: int
    batch: int
    positions: int
    count: int

    def tensors(self) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """The input, W0, and A and B of each adapter."""
        like = {"device": DEVICE, "dtype": torch.bfloat16}
        x = torch.randn(self.batch, self.positions, self.inside, **like, requires_grad=True)
        weight = torch.randn(self.outside, self.inside, **like) * 0.02
        pairs = [
            (torch.randn(R, self.inside, device=DEVICE) * 0.02, torch.randn(self.outside, R, device=DEVICE) * 0.02)
            for _ in range(self.count)
        ]
        return x, weight, [(A.requires_grad_(), B.requires_grad_()) for A, B in pairs]

    def chosen(self) -> str:
        """The way that the op chooses."""
        x = torch.empty(self.batch, self.positions, self.inside, device="meta")
        return "stacked" if is_stacked(x, self.mixture()) else "by sample"

    def mixture(self) -> Mixture:
        """Who uses which adapter."""
        samples = [[float(index == user) for index in range(self.count)] for user in self.users()]
        return Mixture(samples, DEVICE)

    def users(self) -> list[int]:
        """The adapter of each sample."""
        return [(5 * sample + 3) % self.count for sample in range(self.batch)]


class Grouped(torch.autograd.Function):
    """The low-rank term by torch's grouped products, for rows sorted by adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *matrices: Tensor) -> Tensor:
        """``(n, in_features)`` to ``(n, out_features)``."""
        count = len(matrices) // 2
        A, B = (torch.stack(side).to(x.dtype) for side in (matrices[:count], matrices[count:]))
        hidden = F.grouped_mm(x, A.mT, offs=ends)
        ctx.save_for_backward(x, hidden)
        ctx.constants = A, B, ends
        return F.grouped_mm(hidden, B.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of the rows, and of every A and B in fp32."""
        x, hidden = ctx.saved_tensors
        A, B, ends = ctx.constants
        d_hidden = F.grouped_mm(dy, B, offs=ends)
        dA, dB = F.grouped_mm(d_hidden.t(), x, offs=ends), F.grouped_mm(dy.t(), hidden, offs=ends)
        return F.grouped_mm(d_hidden, A, offs=ends), None, *dA.float(), *dB.float()


def grouped(sizes: Sizes, x: Tensor, weight: Tensor, pairs: list[tuple[Tensor, Tensor]], sorts: bool) -> Tensor:
    """The layer by :class:`Grouped`; with ``sorts`` the samples are brought into order and back."""
    order = torch.tensor(sorted(range(sizes.batch), key=sizes.users().__getitem__), device=DEVICE)
    counts = torch.tensor([sizes.users().count(index) for index in range(sizes.count)])
    ends = (counts.cumsum(0) * sizes.positions).to(DEVICE, torch.int32)
    back = order.argsort()

    def call() -> Tensor:
        rows = (x.index_select(0, order) if sorts else x).flatten(0, 1)
        low = Grouped.apply(rows, ends, *(A for A, _ in pairs), *(B for _, B in pairs))
        low = low.view(sizes.batch, sizes.positions, -1)
        return F.linear(x, weight) + (low.index_select(0, back) if sorts else low)

    return call


def calls(sizes: Sizes) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Each way to compute the layer, and what gets a gradient."""
    x, weight, pairs = sizes.tensors()
    matrices = [*(A for A, _ in pairs), *(B for _, B in pairs)]
    mixed = partial(mixed_linear, x, weight, None, matrices, [1.0] * sizes.count, sizes.mixture())
    ways: dict[str, Callable[[], Tensor]] = {
        FROZEN: lambda: F.linear(x, weight),
        ONE: lambda: fused_linear(x, weight, None, *pairs[0], 1.0),
        "by sample": partial(mixed, products=BySample),
        "stacked": partial(mixed, products=Stacked),
    }
    if hasattr(F, "grouped_mm"):
        ways |= {
            "grouped": grouped(sizes, x, weight, pairs, sorts=False),
            "grouped, sorting": grouped(sizes, x, weight, pairs, sorts=True),
        }
    return ways, [x, *(matrix for pair in pairs for matrix in pair)]


def trained(call: Callable[[], Tensor], inputs: list[Tensor]) -> Step:
    """Forward and backward."""
    gradient = torch.randn_like(call().detach())
    return lambda: torch.autograd.grad(call(), inputs, gradient, allow_unused=True)


def inferred(call: Callable[[], Tensor]) -> Step:
    """Forward without gradients."""
    return torch.no_grad()(call)


def several_paths(settings: Settings) -> list[str]:
    lines, small = [], settings.small
    ratios: list[float] = []  # where the host is the limit, single rows differ by 10 % from one call to the next
    features = [(64, 64)] if small else [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)]
    lengths = [2] if small else [1, 4, 16, 64, 128, 256, 512]
    for gradients in (False, True):
        what = "forward and backward" if gradients else "forward without gradients"
        lines += heading(f"A linear layer and a mixed batch of 64 rows, {what}, r = {R}, bf16: us", small)
        header = ["frozen", "one adapter", "by sample", "stacked", "grouped", "grouped, sorting"]
        lines += [f"| in, out, positions, adapters | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
        for inside, outside in features:
            for length in lengths:
                for count in [2] if small else [2, 8, 64]:
                    sizes = Sizes(inside, outside, 4 if small else 64, length, count)
                    times = measured(sizes, gradients, settings.windows(5, 10))
                    ratios.append(times[sizes.chosen()] / min(times["by sample"], times["stacked"]))
                    values = " | ".join(f"{times[name] * 1000:.0f}" if name in times else "" for name in header)
                    lines.append(f"| {inside}, {outside}, {length}, {count} | {values} |")
        lines.append("")
    what = f"{OURS}, the way that the rule chooses, time over the faster one, mean of all rows"
    return [*lines, at_most(what, statistics.mean(ratios), 1.05)]


def measured(sizes: Sizes, gradients: bool, windows: Windows) -> dict[str, float]:
    """Milliseconds by the way; one that fails is left out."""
    clear()
    ways, inputs = calls(sizes)
    steps: dict[str, Step] = {}
    for name, call in ways.items():
        try:
            steps[name] = trained(call, inputs) if gradients else inferred(call)
            for _ in range(3):
                steps[name]()
        except Exception as error:
            steps.pop(name, None)
            print(f"{name}, {sizes}: {type(error).__name__}: {error}"[:300])
    return in_turns(steps, windows)
