"""Cache for layers that share an input (query, key and value; gate and up): ``A x`` is computed once.

The first layer that is called multiplies the input with the stacked A of all of them. In backward the frozen weights
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

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.fused_linear import PLAIN_CLASSES, compute_dtype
from lightning_lora.ops.products import add_product, as_matrix, base_plus_low_rank, matmul, scaled
from lightning_lora.torch_internals import (
    backward_id,
    backward_reaches,
    cuda_stream_id,
    saved_tensors_have_hooks,
    version_of,
)

MIN_ELEMENTS = 2**22  # of an input; below this, reading it again costs less than the sharing


class InputGradient:
    """The gradient of a shared input, to which the frozen layers add their parts during one backward pass.

    Several passes may run at the same time: nested passes, and passes of other threads.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # by backward pass
        self.is_spent = False  # the graph may be freed

    def add(self, dy: Tensor, weight: Tensor) -> None:
        """Add ``dy @ weight``."""
        now = backward_id()
        self.sums[now] = add_product(self.sums.pop(now, None), dy, weight)

    def take(self) -> Tensor | None:
        """Return the sum of this pass and forget it."""
        self.is_spent = True
        return self.sums.pop(backward_id(), None)


class StackedHidden(torch.autograd.Function):
    """``scale * A x`` for every A; backward returns the full gradient of ``x``, with the part of the frozen layers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_gradient: InputGradient, scales: tuple[float, ...], *all_A: Tensor
    ) -> tuple[Tensor, ...]:
        """``(..., in_features)`` and one A of ``(r, in_features)`` per layer to one ``(n, r)`` per layer."""
        stacked = stack_A(all_A, scales, x.dtype)
        ctx.save_for_backward(x, stacked)
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient
        ctx.input_gradient, ctx.all_A, ctx.scales = input_gradient, all_A, scales
        ctx.versions = [version_of(A) for A in all_A]
        return torch.split(torch.mm(as_matrix(x), stacked.t()), [len(A) for A in all_A], dim=1)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *d_hidden: Tensor | None) -> Any:
        """The gradients of ``x``, and of each A in its own dtype."""
        x, stacked = ctx.saved_tensors
        shape, x = x.shape, as_matrix(x)
        if torch.is_grad_enabled():  # this backward is differentiated again
            all_A = [check_unmodified(*pair) for pair in zip(ctx.all_A, ctx.versions, strict=True)]
            stacked = stack_A(all_A, ctx.scales, x.dtype)
        ranks = [len(A) for A in ctx.all_A]
        filled = [x.new_zeros(len(x), r) if d is None else d for d, r in zip(d_hidden, ranks, strict=True)]
        d_stacked = torch.cat(filled, dim=1)  # (n, sum of r)
        total = ctx.input_gradient.take()
        dx = add_product(total, d_stacked, stacked).view(shape) if ctx.needs_input_grad[0] else None
        all_dA = split_dA(matmul(d_stacked.t(), x, ctx.all_A[0].dtype), ctx.scales, ranks)
        return dx, None, None, *(None if d is None else dA for d, dA in zip(d_hidden, all_dA, strict=True))


def stack_A(all_A: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Every ``scale * A`` in one matrix, ``(sum of r, in_features)``."""
    if len(set(scales)) == 1:
        return scaled(torch.cat(list(all_A)), scales[0], dtype)
    return torch.cat([scaled(A, scale, dtype) for A, scale in zip(all_A, scales, strict=True)])


def split_dA(total: Tensor, scales: Sequence[float], ranks: list[int]) -> list[Tensor]:
    """The gradient of every A, scaled, from that of the stacked matrix, ``(sum of r, in_features)``."""
    same = len(set(scales)) == 1
    total = scaled(total, scales[0], total.dtype) if same else total
    all_dA = [total[stop - r : stop] for r, stop in zip(ranks, accumulate(ranks), strict=True)]
    return all_dA if same else [scaled(dA, scale, dA.dtype) for dA, scale in zip(all_dA, scales, strict=True)]


@dataclass
class LayerShare:
    """What one layer gets of a shared input.

    Args:
        hidden: ``scale * A x`` of this layer, ``(n, r)``.
        x: the input, detached, ``(..., in_features)``.
        input_gradient: where the layer adds its part of the gradient of the input.
        needs_dx: whether the input requires a gradient.
    """

    hidden: Tensor
    x: Tensor
    input_gradient: InputGradient
    needs_dx: bool


class LinearFromHidden(torch.autograd.Function):
    """``W0 x + b + B h`` for a computed ``h = scale * A x``; :class:`StackedHidden` returns the gradient of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        input_gradient: InputGradient,
        needs_dx: bool,
    ) -> Tensor:
        """``hidden`` of shape ``(n, r)`` and a detached ``x``, ``(..., in_features)``, to ``(..., out_features)``."""
        cast_B = B.to(x.dtype)
        ctx.save_for_backward(hidden, cast_B, weight if needs_dx else None)
        ctx.B, ctx.version, ctx.input_gradient, ctx.needs_dx = B, version_of(B), input_gradient, needs_dx
        return base_plus_low_rank(x, weight, bias, hidden, cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of ``hidden``, the bias and B; the part of ``x`` is added to ``input_gradient``."""
        hidden, cast_B, weight = ctx.saved_tensors
        dy = as_matrix(dy)
        if torch.is_grad_enabled():  # this backward is differentiated again
            cast_B = check_unmodified(ctx.B, ctx.version).to(dy.dtype)
        needs_d_hidden, _, _, needs_db, needs_dB, *_ = ctx.needs_input_grad
        # Where the pass ends before StackedHidden, nothing would take the sum, and it would live as long as the graph.
        if ctx.needs_dx and (torch.compiler.is_compiling() or backward_reaches(ctx.next_functions[0][0])):
            ctx.input_gradient.add(dy, weight)
        d_hidden = torch.mm(dy, cast_B) if needs_d_hidden else None
        db = dy.sum(0) if needs_db else None
        dB = matmul(dy.t(), hidden, ctx.B.dtype) if needs_dB else None
        return d_hidden, None, None, db, dB, None, None


def linear_from_hidden(share: LayerShare, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The output of :class:`LinearFromHidden`."""
    arguments = share.hidden, share.x, weight, bias, B, share.input_gradient, share.needs_dx
    y: Tensor = LinearFromHidden.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class ScaledA(Protocol):
    """What the layers that share an input must know of each other: A and the scale of each."""

    scale: float

    @property
    def A(self) -> Tensor:
        """``(r, in_features)``."""


@dataclass
class CachedHidden:
    """What the first layer of a group computed from an input, for the other layers."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    A_of_layers: Sequence[Tensor]
    hidden: dict[ScaledA, Tensor]
    detached_x: Tensor
    input_gradient: InputGradient

    def is_valid(self, adapters: Sequence[ScaledA], x: Tensor) -> bool:
        """Whether ``x`` and every A are the same and unmodified, and the graph of their products still exists."""
        if self.x() is not x or self.input_gradient.is_spent or self.state != input_state(adapters, x):
            return False
        return all(adapter.A is A for adapter, A in zip(adapters, self.A_of_layers, strict=True))


def input_state(adapters: Sequence[ScaledA], x: Tensor) -> tuple[object, ...]:
    """The state of ``x`` and of every A, with the thread and the stream: nothing is shared between those."""
    stream = cuda_stream_id(x.device) if x.is_cuda else 0
    all_A = [(adapter.scale, *tensor_state(adapter.A)) for adapter in adapters]
    return compute_dtype(x), x.grad_fn, get_ident(), stream, tensor_state(x), all_A


def tensor_state(tensor: Tensor) -> tuple[int, int, bool]:
    """Equal for an unmodified ``tensor``; a write in place through ``.data`` is not seen."""
    return version_of(tensor), tensor.data_ptr(), tensor.requires_grad


class SharedInputGroup:
    """Adapters of layers that, by their names, share an input; whether they do is checked at each call.

    The cache is cleared when all layers have their share, when the input is freed, or at the next input. If one layer
    is never called, and no backward frees the input, it lives until then.

    Args:
        adapters: one per layer, all with the same ``in_features``.
    """

    def __init__(self, adapters: Sequence[ScaledA]) -> None:
        self.adapters = list(adapters)
        self.cached: CachedHidden | None = None

    def share(self, adapter: ScaledA, x: Tensor) -> LayerShare | None:
        """The share of ``adapter`` in ``x``, or ``None`` where nothing can be shared.

        Nothing is shared while hooks pack saved tensors (activation checkpointing, offloading), as a layer could be
        recomputed without the others; nor for an inference tensor, which has no version to compare.
        """
        if x.numel() < MIN_ELEMENTS or saved_tensors_have_hooks() or not torch.is_grad_enabled() or x.is_inference():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # the layers may be replayed one by one
            return None
        cached = self.cached
        if cached is None or adapter not in cached.hidden or not cached.is_valid(self.adapters, x):
            if not self.can_share(adapter, x):
                return None
            self.cached = cached = self._compute(x)
        hidden = cached.hidden.pop(adapter)  # a second call of a layer with the same input computes again
        if not cached.hidden:
            self.cached = None
        return LayerShare(hidden, cached.detached_x, cached.input_gradient, x.requires_grad)

    def hidden_while_compiling(self, adapter: ScaledA, x: Tensor) -> Tensor:
        """``A x`` of ``adapter``, ``(..., r)``, while a compiler traces."""
        from lightning_lora.ops.compiled_input import hidden_while_compiling  # imports the compiler: 1.5 s

        index = next(i for i, member in enumerate(self.adapters) if member is adapter)
        hidden: Tensor = hidden_while_compiling(x, index, *(member.A for member in self.adapters))
        return hidden

    def can_share(self, adapter: ScaledA, x: Tensor) -> bool:
        """Whether every A is a plain matrix on the device of ``x``, and ``adapter`` itself is in the group."""
        for A in (member.A for member in self.adapters):
            if type(A) not in PLAIN_CLASSES or A.dim() != 2 or A.shape[1] != x.shape[-1] or A.device != x.device:
                return False
        return any(member is adapter for member in self.adapters)

    def _compute(self, x: Tensor) -> CachedHidden:
        input_gradient, scales = InputGradient(), tuple(adapter.scale for adapter in self.adapters)
        all_A = [adapter.A for adapter in self.adapters]
        cast_x = x.to(compute_dtype(x))
        all_hidden = StackedHidden.apply(cast_x, input_gradient, scales, *all_A)  # type: ignore[no-untyped-call]
        hidden = dict(zip(self.adapters, all_hidden, strict=True))
        state = input_state(self.adapters, x)
        return CachedHidden(weakref.ref(x, self._forget), state, all_A, hidden, cast_x.detach(), input_gradient)

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self.cached is not None and self.cached.x is x:
            self.cached = None

    def __getstate__(self) -> dict[str, object]:
        return {"adapters": self.adapters, "cached": None}
