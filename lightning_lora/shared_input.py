"""Layers that read the same input, as query, key and value do: their adapters read it once.

The first that is called multiplies it with the A of all of them, on top of each other. In backward the frozen maps add
up the input's gradient in one place, and the A's add theirs in one product: as separate sums each would be written,
and read again to be added.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter
from lightning_lora.one_node import PLAIN, computed_dtype
from lightning_lora.products import both_terms, product, rows_of, scaled, sum_of_products
from lightning_lora.traced_input import low_rank_input

WIDE = 2**22  # elements of an input from which on reading it again costs more than the sharing


class InputGradient:
    """The gradient of an input while the frozen maps that read it add their parts, in one pass of backward."""

    def __init__(self) -> None:
        self.task, self.sum = -1, None

    sum: Tensor | None

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
        dx = sum_of_products(ctx.total.take(), back, down) if ctx.needs_input_grad[0] else None
        dx = None if dx is None else dx.view(shape)
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
        bias = gradient.sum(0) if wants_bias else None
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        return back, None, None, bias, dB, None


@dataclass
class Shared:
    """What one layer gets of an input that several read: ``scale * A x``, its data, and where its gradient goes."""

    hidden: Tensor
    data: Tensor
    total: InputGradient | None


def frozen_with_hidden(shared: Shared, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The node's output."""
    y: Tensor = FrozenWithHidden.apply(shared.hidden, shared.data, weight, bias, B, shared.total)  # type: ignore[no-untyped-call]
    return y


@dataclass
class Reading:
    """What the first of some layers made of an input, for the others to find."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    versions: list[tuple[Tensor, int]]
    hidden: dict[Adapter, Tensor]
    data: Tensor
    total: InputGradient | None

    def is_of(self, adapters: Sequence[Adapter], x: Tensor) -> bool:
        """Whether ``x`` and every A are the same and as they were, so that the products are, too."""
        if self.x() is not x or self.state != state_of(x):
            return False
        pairs = zip(adapters, self.versions, strict=True)
        return all(adapter.A is A and A._version == version for adapter, (A, version) in pairs)


def state_of(x: Tensor) -> tuple[object, ...]:
    """How ``x`` is read now; and by which stream, as nothing is shared with another."""
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    return x._version, computed_dtype(x), stream


class Siblings:
    """Adapters of layers that by their names read the same input; whether they do is seen at each call.

    Args:
        adapters: one of each layer, of the same ``in_features``.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)
        self.reading: Reading | None = None

    def read(self, adapter: Adapter, x: Tensor) -> Shared | None:
        """What ``adapter`` gets of ``x``, or ``None`` where nothing is shared.

        Nothing is shared while tensors for backward are packed (activation checkpointing, offloading): what was kept
        for one layer could be asked for while another is computed again.
        """
        packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if x.numel() < WIDE or packed or not torch.is_grad_enabled() or x.is_inference():
            return None
        reading = self.reading
        if reading is None or adapter not in reading.hidden or not reading.is_of(self.adapters, x):
            if not self._can_share(adapter, x):
                return None
            self.reading = reading = self._read(x)
        hidden = reading.hidden.pop(adapter)  # once: a second call on the same input starts anew
        if not reading.hidden:
            self.reading = None
        return Shared(hidden, reading.data, reading.total)

    def traced(self, adapter: Adapter, x: Tensor) -> Tensor:
        """``A x`` of ``adapter`` while a compiler traces."""
        at = next(i for i, other in enumerate(self.adapters) if other is adapter)
        hidden: Tensor = low_rank_input(x, at, *(other.A for other in self.adapters))
        return hidden

    def _can_share(self, adapter: Adapter, x: Tensor) -> bool:
        """Not for a copy of a layer that left the others behind, nor where an A is elsewhere, in part or not there."""
        every_A, device, width = [a.A for a in self.adapters], x.device, x.shape[-1]
        plain = all(type(A) in PLAIN and A.dim() == 2 and A.shape[1] == width and A.device == device for A in every_A)
        return plain and any(other is adapter for other in self.adapters)

    def _read(self, x: Tensor) -> Reading:
        total, scales = InputGradient(), tuple(adapter.scale for adapter in self.adapters)
        every_A = [adapter.A for adapter in self.adapters]
        given = x.to(computed_dtype(x))
        every_hidden = LowRankInputs.apply(given, total, scales, *every_A)  # type: ignore[no-untyped-call]
        return Reading(
            weakref.ref(x, self._forget),
            state_of(x),
            [(A, A._version) for A in every_A],
            dict(zip(self.adapters, every_hidden, strict=True)),
            given.detach(),
            total if x.requires_grad else None,
        )

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self.reading is not None and self.reading.x is gone:
            self.reading = None

    def __getstate__(self) -> dict[str, object]:
        return {"adapters": self.adapters, "reading": None}
