"""The nodes of layers that read the same input, as query, key and value do: their adapters read it once.

The first that is called multiplies it with the A of all of them, on top of each other. In backward the frozen maps add
up the input's gradient in one place, and the A's add theirs in one product: as separate sums each would be written,
and read again to be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.products import both_terms, product, rows_of, scaled, sum_of_products


class InputGradient:
    """The gradient of an input while the frozen maps that read it add their parts, in one pass of backward."""

    sum: Tensor | None

    def __init__(self) -> None:
        self.task, self.sum = -1, None

    def add(self, gradient: Tensor, weight: Tensor) -> None:
        """``gradient @ weight`` on top of what is there; what a pass that was not finished left counts for nothing."""
        task = torch._C._current_graph_task_id()
        if self.task != task:
            self.task, self.sum = task, None
        self.sum = sum_of_products(self.sum, gradient, weight)

    def take(self) -> Tensor | None:
        """What this pass added up, which is then gone."""
        found, self.sum = self.sum, None
        return found if self.task == torch._C._current_graph_task_id() else None


class LowRankInputs(torch.autograd.Function):
    """``scale * A x`` for every A, and the way back for the whole gradient of ``x``, the frozen maps' part included."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, total: InputGradient, scales: tuple[float, ...], *every_A: Tensor
    ) -> tuple[Tensor, ...]:
        """``(..., in_features)`` and an A of ``(r, in_features)`` for each map to as many ``(n, r)``."""
        down = on_top(every_A, scales, x.dtype)
        ctx.save_for_backward(x, down)
        ctx.set_materialize_grads(False)  # of a map that was not called there is none
        ctx.total, ctx.every_A, ctx.scales = total, every_A, scales
        return torch.split(torch.mm(rows_of(x), down.t()), [len(A) for A in every_A], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Of ``x`` what :class:`InputGradient` has, and A's part; of each A in its own dtype."""
        x, down = ctx.saved_tensors
        shape, x = x.shape, rows_of(x)
        if torch.is_grad_enabled():
            down = on_top(ctx.every_A, ctx.scales, x.dtype)
        ranks = [len(A) for A in ctx.every_A]
        parts = [x.new_zeros(len(x), r) if g is None else g for g, r in zip(gradients, ranks, strict=True)]
        back = torch.cat(parts, dim=1)
        dx = sum_of_products(ctx.total.take(), back, down).view(shape) if ctx.needs_input_grad[0] else None
        every_dA = below(product(back.t(), x, ctx.every_A[0].dtype), ctx.scales, ranks)
        return dx, None, None, *(None if g is None else dA for g, dA in zip(gradients, every_dA, strict=True))


def on_top(every_A: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Every ``scale * A``, one on top of the other."""
    if len(set(scales)) == 1:
        return scaled(torch.cat(list(every_A)), scales[0], dtype)
    return torch.cat([scaled(A, scale, dtype) for A, scale in zip(every_A, scales, strict=True)])


def below(total: Tensor, scales: Sequence[float], ranks: list[int]) -> list[Tensor]:
    """``total`` of as many rows taken apart again, each part scaled."""
    if len(set(scales)) == 1:
        return list(torch.split(scaled(total, scales[0], total.dtype), ranks))
    return [scaled(part, scale, part.dtype) for part, scale in zip(torch.split(total, ranks), scales, strict=True)]


class FrozenWithHidden(torch.autograd.Function):
    """``W0 x + b + B h`` where ``h = scale * A x`` is there; :class:`LowRankInputs` hands on what ``x`` gets."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        total: InputGradient | None,
    ) -> Tensor:
        """``(n, r)`` and ``(..., in_features)``, which is data alone here, to ``(..., out_features)``."""
        up = B.to(x.dtype)
        ctx.save_for_backward(hidden, up, None if total is None else weight)
        ctx.B, ctx.total = B, total
        return both_terms(x, weight, bias, hidden, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of ``hidden`` and B; what ``x`` gets goes into ``total``."""
        hidden, up, weight = ctx.saved_tensors
        gradient = rows_of(gradient)
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            up = ctx.B.to(gradient.dtype)
        if ctx.total is not None:
            ctx.total.add(gradient, weight)
        wants_hidden, _, _, wants_bias, wants_B, _ = ctx.needs_input_grad
        back = torch.mm(gradient, up) if wants_hidden else None
        db = gradient.sum(0) if wants_bias else None
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        return back, None, None, db, dB, None
