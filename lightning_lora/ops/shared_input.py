"""Layers that read the same input (query, key and value; gate and up) compute ``A x`` once.

The first layer that is called multiplies the input with the A of all of them, stacked. In backward the frozen weights
accumulate the gradient of the input in one tensor, and all A add theirs in one product. As separate sums each would be
written to memory, and read again to be added.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.ops.compiled_input import low_rank_input
from lightning_lora.ops.dispatch import as_it_was, outside_autocast
from lightning_lora.ops.fused_linear import PLAIN, computed_dtype
from lightning_lora.ops.products import both_terms, product, rows_of, scaled, sum_of_products
from lightning_lora.torch_internals import (
    backward_id,
    backward_reaches,
    cuda_stream_id,
    saved_tensors_have_hooks,
    version_of,
)


class InputGradient:
    """The gradient of an input while the frozen maps that read it add their parts, in one pass of backward.

    Several passes may be under way: nested ones, and those of other threads.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # by pass
        self.is_spent = False  # the graph may be gone

    def add(self, gradient: Tensor, weight: Tensor) -> None:
        """``gradient @ weight`` on top of what is there."""
        now = backward_id()
        self.sums[now] = sum_of_products(self.sums.pop(now, None), gradient, weight)

    def take(self) -> Tensor | None:
        """What this pass added up, which is then gone."""
        self.is_spent = True
        return self.sums.pop(backward_id(), None)


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
        if ctx.wants_x and (torch.compiler.is_compiling() or backward_reaches(ctx.next_functions[0][0])):
            ctx.total.add(gradient, weight)
        back = torch.mm(gradient, up) if wants_hidden else None
        db = gradient.sum(0) if wants_bias else None
        dB = product(gradient.t(), hidden, ctx.B.dtype) if wants_B else None
        return back, None, None, db, dB, None, None


class ScaledA(Protocol):
    """What layers that read the same input share: A and the scale of each."""

    scale: float

    @property
    def A(self) -> Tensor:
        """``(r, in_features)``."""


WIDE = 2**22  # elements of an input from which on reading it again costs more than the sharing


@dataclass
class Shared:
    """What one layer gets of an input that several read: ``scale * A x``, its data, and where its gradient goes."""

    hidden: Tensor
    data: Tensor
    total: InputGradient
    wants_x: bool


def frozen_with_hidden(shared: Shared, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The node's output."""
    given = shared.hidden, shared.data, weight, bias, B, shared.total, shared.wants_x
    y: Tensor = FrozenWithHidden.apply(*given)  # type: ignore[no-untyped-call]
    return y


@dataclass
class Reading:
    """What the first of some layers made of an input, for the others to find."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    matrices: Sequence[Tensor]
    hidden: dict[ScaledA, Tensor]
    data: Tensor
    total: InputGradient

    def is_of(self, adapters: Sequence[ScaledA], x: Tensor) -> bool:
        """Whether ``x`` and every A are the same and as they were, and the graph of their products is there."""
        if self.x() is not x or self.total.is_spent or self.state != state_of(adapters, x):
            return False
        return all(adapter.A is A for adapter, A in zip(adapters, self.matrices, strict=True))


def state_of(adapters: Sequence[ScaledA], x: Tensor) -> tuple[object, ...]:
    """How ``x`` and every A are now, and by whom they are read: nothing is shared with another thread or stream."""
    stream = cuda_stream_id(x.device) if x.is_cuda else 0
    every_A = [(adapter.scale, *moment_of(adapter.A)) for adapter in adapters]
    return computed_dtype(x), x.grad_fn, get_ident(), stream, moment_of(x), every_A


def moment_of(tensor: Tensor) -> tuple[int, int, bool]:
    """What tells that ``tensor`` is as it was; writes through ``.data`` in place alone do not show."""
    return version_of(tensor), tensor.data_ptr(), tensor.requires_grad


class Siblings:
    """Adapters of layers that by their names read the same input; whether they do is seen at each call.

    What the first made of an input is forgotten when all have it, when the input is gone, or at the next: where one is
    never called, and no backward lets go of the input, it stays until then.

    Args:
        adapters: one of each layer, of the same ``in_features``.
    """

    def __init__(self, adapters: Sequence[ScaledA]) -> None:
        self.adapters = list(adapters)
        self.reading: Reading | None = None

    def read(self, adapter: ScaledA, x: Tensor) -> Shared | None:
        """What ``adapter`` gets of ``x``, or ``None`` where nothing is shared.

        Nothing is shared while tensors for backward are packed (activation checkpointing, offloading): what was kept
        for one layer could be asked for while another is computed again; nor of an inference tensor, which has no
        version to compare.
        """
        if x.numel() < WIDE or saved_tensors_have_hooks() or not torch.is_grad_enabled() or x.is_inference():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # layers may be replayed one by one
            return None
        reading = self.reading
        if reading is None or adapter not in reading.hidden or not reading.is_of(self.adapters, x):
            if not self.can_share(adapter, x):
                return None
            self.reading = reading = self._read(x)
        hidden = reading.hidden.pop(adapter)  # once: a second call on the same input starts anew
        if not reading.hidden:
            self.reading = None
        return Shared(hidden, reading.data, reading.total, x.requires_grad)

    def traced(self, adapter: ScaledA, x: Tensor) -> Tensor:
        """``A x`` of ``adapter`` while a compiler traces."""
        at = next(i for i, other in enumerate(self.adapters) if other is adapter)
        hidden: Tensor = low_rank_input(x, at, *(other.A for other in self.adapters))
        return hidden

    def can_share(self, adapter: ScaledA, x: Tensor) -> bool:
        """Not for a copy of a layer that left the others behind, nor where an A is elsewhere, in part or not there."""
        every_A, device, width = [a.A for a in self.adapters], x.device, x.shape[-1]
        plain = all(type(A) in PLAIN and A.dim() == 2 and A.shape[1] == width and A.device == device for A in every_A)
        return plain and any(other is adapter for other in self.adapters)

    def _read(self, x: Tensor) -> Reading:
        total, scales = InputGradient(), tuple(adapter.scale for adapter in self.adapters)
        every_A = [adapter.A for adapter in self.adapters]
        given = x.to(computed_dtype(x))
        every_hidden = LowRankInputs.apply(given, total, scales, *every_A)  # type: ignore[no-untyped-call]
        hidden = dict(zip(self.adapters, every_hidden, strict=True))
        gone = weakref.ref(x, self._forget)
        return Reading(gone, state_of(self.adapters, x), every_A, hidden, given.detach(), total)

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self.reading is not None and self.reading.x is gone:
            self.reading = None

    def __getstate__(self) -> dict[str, object]:
        return {"adapters": self.adapters, "reading": None}
