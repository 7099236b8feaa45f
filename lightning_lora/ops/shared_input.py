"""The nodes of layers that read the same input, as query, key and value do: their adapters read it once.

The first that is called multiplies it with the A of all of them, on top of each other. In backward the frozen maps add
up the input's gradient in one place, and the A's add theirs in one product: as separate sums each would be written,
and read again to be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import as_it_was, outside_autocast, version_of
from lightning_lora.ops.products import both_terms, product, rows_of, scaled, sum_of_products


class InputGradient:
    """The gradient of an input while the frozen maps that read it add their parts, in one pass of backward.

    Several passes may be under way: nested ones, and those of other threads.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # by pass
        self.is_spent = False  # the graph may be gone

    def add(self, gradient: Tensor, weight: Tensor) -> None:
        """``gradient @ weight`` on top of what is there."""
        now = torch._C._current_graph_task_id()
        self.sums[now] = sum_of_products(self.sums.pop(now, None), gradient, weight)

    def take(self) -> Tensor | None:
        """What this pass added up, which is then gone."""
        self.is_spent = True
        return self.sums.pop(torch._C._current_graph_task_id(), None)


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
        ctx.versions = [version_of(A) for A in every_A]
        return torch.split(torch.mm(rows_of(x), down.t()), [len(A) for A in every_A], dim=1)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Of ``x`` what :class:`InputGradient` has, and A's part; of each A in its own dtype."""
        x, down = ctx.saved_tensors
        shape, x = x.shape, rows_of(x)
        if torch.is_grad_enabled():
            every_A = [as_it_was(*pair) for pair in zip(ctx.every_A, ctx.versions, strict=True)]
            down = on_top(every_A, ctx.scales, x.dtype)
        ranks = [len(A) for A in ctx.every_A]
        parts = [x.new_zeros(len(x), r) if g is None else g for g, r in zip(gradients, ranks, strict=True)]
        back = torch.cat(parts, dim=1)
        total = ctx.total.take()
        dx = sum_of_products(total, back, down).view(shape) if ctx.needs_input_grad[0] else None
        every_dA = below(product(back.t(), x, ctx.every_A[0].dtype), ctx.scales, ranks)
        return dx, None, None, *(None if g is None else dA for g, dA in zip(gradients, every_dA, strict=True))


def on_top(every_A: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Every ``scale * A``, one on top of the other."""
    if len(set(scales)) == 1:
        return scaled(torch.cat(list(every_A)), scales[0], dtype)
    return torch.cat([scaled(A, scale, dtype) for A, scale in zip(every_A, scales, strict=True)])


def below(total: Tensor, scales: Sequence[float], ranks: list[int]) -> list[Tensor]:
    """``total`` of as many rows taken apart again, each part scaled."""
    same = len(set(scales)) == 1
    total = scaled(total, scales[0], total.dtype) if same else total
    parts = [total[stop - r : stop] for r, stop in zip(ranks, accumulate(ranks), strict=True)]
    return parts if same else [scaled(part, scale, part.dtype) for part, scale in zip(parts, scales, strict=True)]


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
        total: InputGradient,
        wants_x: bool,
    ) -> Tensor:
        """``(n, r)`` and ``(..., in_features)``, which is data alone here, to ``(..., out_features)``."""
        up = B.to(x.dtype)
        ctx.save_for_backward(hidden, up, weight if wants_x else None)
        ctx.B, ctx.version, ctx.total, ctx.wants_x = B, version_of(B), total, wants_x
        return both_terms(x, weight, bias, hidden, up)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of ``hidden`` and B; what ``x`` gets goes into ``total``."""
        hidden, up, weight = ctx.saved_tensors
        gradient = rows_of(gradient)
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            up = as_it_was(ctx.B, ctx.version).to(gradient.dtype)
        wants_hidden, _, _, wants_bias, wants_B, *_ = ctx.needs_input_grad
        if ctx.wants_x and (torch.compiler.is_compiling() or _reaches_input(ctx)):
            ctx.total.add(gradient, weight)
        back = torch.mm(gradient, up) if wants_hidden else None
        db = gradient.sum(0) if wants_bias else None
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        return back, None, None, db, dB, None, None


def _reaches_input(ctx: Any) -> bool:
    """Whether this pass goes on to :class:`LowRankInputs`: what nobody takes would stay with the graph."""
    return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))
