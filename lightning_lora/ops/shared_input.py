"""Cache for layers that share an input (query, key and value; gate and up): ``A x`` is computed once.

The first layer that is called multiplies the input with the stacked A of all of them. In backward the frozen weights
accumulate the gradient of the input in one tensor, and all A add theirs in one product. As separate sums each would be
written to memory, and read again to be added.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.dispatch import check_unmodified, without_autocast
from lightning_lora.ops.fused_linear import PLAIN_CLASSES, compute_dtype
from lightning_lora.ops.products import add_product, as_matrix, base_plus_low_rank, like, matmul, scaled
from lightning_lora.torch_internals import (
    apply_of,
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
    def forward(ctx: Any, x: Tensor, input_gradient: InputGradient, scale: float, *all_A: Tensor) -> tuple[Tensor, ...]:
        """``(..., in_features)`` and one A of ``(r, in_features)`` per layer to one ``(n, r)`` per layer."""
        stacked, ranks = scaled(torch.cat(all_A), scale, x.dtype), [A.size(0) for A in all_A]
        ctx.save_for_backward(x, stacked)
        ctx.set_materialize_grads(False)  # a layer that was not called has no gradient
        ctx.constants = input_gradient, scale, all_A, [version_of(A) for A in all_A], ranks
        return torch.split(F.linear(as_matrix(x), stacked), ranks, 1)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *d_hidden: Tensor | None) -> Any:
        """The gradients of ``x``, and of each A in its own dtype."""
        x, stacked = ctx.saved_tensors
        input_gradient, scale, all_A, versions, ranks = ctx.constants
        again, rows = torch.is_grad_enabled(), as_matrix(x)
        if again:  # this backward is differentiated again
            all_A = [check_unmodified(*pair) for pair in zip(all_A, versions, strict=True)]
            stacked = scaled(torch.cat(all_A), scale, x.dtype)
        filled = [x.new_zeros(len(rows), r) if d is None else d for d, r in zip(d_hidden, ranks, strict=True)]
        d_stacked = torch.cat(filled, 1)  # (n, sum of r)
        total = input_gradient.take()
        dx = like(add_product(total, d_stacked, stacked), x) if ctx.needs_input_grad[0] else None
        dA = matmul(d_stacked.t(), rows, all_A[0].dtype)
        if scale != 1:
            dA = scale * dA if again else dA.mul_(scale)
        all_dA = torch.split(dA, ranks)
        return dx, None, None, *(None if d is None else dA for d, dA in zip(d_hidden, all_dA, strict=True))


class LayerShare(NamedTuple):
    """What one layer gets of a shared input.

    Args:
        hidden: ``scale * A x`` of this layer, ``(n, r)``.
        x: the input, detached, ``(..., in_features)``.
        input_gradient: where the layer adds its part of the gradient of the input; ``None`` if it needs none.
    """

    hidden: Tensor
    x: Tensor
    input_gradient: InputGradient | None


class LinearFromHidden(torch.autograd.Function):
    """``W0 x + b + B h`` for a computed ``h = scale * A x``; :class:`StackedHidden` returns the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, B: Tensor, constants: tuple[Any, ...]) -> Tensor:
        """``(n, r)`` to ``(..., out_features)``.

        Args:
            ctx: the node.
            hidden: ``h``.
            bias: ``(out_features,)``.
            B: is cast to the dtype of ``hidden``.
            constants: W0, a detached ``x`` of shape ``(..., in_features)``, and its :class:`InputGradient`.
        """
        weight, x, input_gradient = constants
        cast_B = B.to(dtype=x.dtype)
        ctx.save_for_backward(hidden)
        ctx.constants = B, cast_B, version_of(B), weight, version_of(weight), input_gradient
        hidden = hidden if x.dim() == 2 else hidden.view(*x.shape[:-1], -1)
        return base_plus_low_rank(x, weight, bias, hidden, cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of ``hidden``, the bias and B; the part of ``x`` is added to its :class:`InputGradient`."""
        (hidden,) = ctx.saved_tensors
        B, cast_B, B_version, weight, weight_version, input_gradient = ctx.constants
        needs_d_hidden, needs_db, needs_dB, _ = ctx.needs_input_grad
        dy = as_matrix(dy)
        if torch.is_grad_enabled():  # this backward is differentiated again
            cast_B = check_unmodified(B, B_version).to(dtype=dy.dtype)
        elif cast_B is B:
            check_unmodified(B, B_version)
        # Where the pass ends before StackedHidden, nothing would take the sum, and it would live as long as the graph.
        if input_gradient and (torch.compiler.is_compiling() or backward_reaches(ctx.next_functions[0][0])):
            input_gradient.add(dy, check_unmodified(weight, weight_version))
        d_hidden = torch.mm(dy, cast_B) if needs_d_hidden else None
        db = dy.sum(0) if needs_db else None
        return d_hidden, db, matmul(dy.t(), hidden, B.dtype) if needs_dB else None, None


_apply_stacked, _apply_from_hidden = apply_of(StackedHidden), apply_of(LinearFromHidden)


def linear_from_hidden(share: LayerShare, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The output of :class:`LinearFromHidden`."""
    hidden, x, input_gradient = share
    y: Tensor = _apply_from_hidden(hidden, bias, B, (weight, x, input_gradient))
    return y


class ScaledA(Protocol):
    """What the layers that share an input must know of each other: A and the scale of each."""

    scale: float

    @property
    def A(self) -> Tensor:
        """``(r, in_features)``."""


@dataclass
class CachedHidden:
    """What the first layer of a group computed from an input, for the other layers.

    Args:
        x: the input.
        state: of the input, when the products were computed.
        detached_x: ``x`` in the dtype of the products.
        input_gradient: of the input.
        hidden: of each layer its A, the state of it, and the product.
    """

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    detached_x: Tensor
    input_gradient: InputGradient
    hidden: dict[ScaledA, tuple[Tensor, tuple[object, ...], Tensor]]

    def take(self, adapter: ScaledA, x: Tensor) -> Tensor | None:
        """The product for ``adapter``, if ``x`` and A are the same and unmodified, and its graph still exists."""
        A, state, hidden = self.hidden.get(adapter, (None, (), None))
        if A is not adapter.A or self.x() is not x or self.input_gradient.is_spent:
            return None
        if self.state != input_state(x) or state != state_of(adapter):
            return None
        del self.hidden[adapter]  # a second call of a layer with the same input computes again
        return hidden


def input_state(x: Tensor) -> tuple[object, ...]:
    """The state of ``x``, with the thread and the stream: nothing is shared between those."""
    stream = cuda_stream_id(x.device) if x.is_cuda else 0
    return compute_dtype(x), version_of(x), x.data_ptr(), x.requires_grad, x.grad_fn, get_ident(), stream


def state_of(adapter: ScaledA) -> tuple[object, ...]:
    """Equal for an unmodified A; a write in place through ``.data`` is not seen."""
    A = adapter.A
    return version_of(A), A.data_ptr(), A.requires_grad, adapter.scale


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
        hidden = None if cached is None else cached.take(adapter, x)
        if cached is None or hidden is None:
            if not self.can_share(adapter, x) or any(member.scale != adapter.scale for member in self.adapters):
                return None
            self.cached = cached = self._compute(x)
            _, _, hidden = cached.hidden.pop(adapter)
        if not cached.hidden:
            self.cached = None
        return LayerShare(hidden, cached.detached_x, cached.input_gradient if x.requires_grad else None)

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
        input_gradient, cast_x = InputGradient(), x.to(compute_dtype(x)).contiguous()
        all_A = [adapter.A for adapter in self.adapters]
        products = _apply_stacked(cast_x, input_gradient, self.adapters[0].scale, *all_A)
        hidden = {
            adapter: (A, state_of(adapter), product)
            for adapter, A, product in zip(self.adapters, all_A, products, strict=True)
        }
        cast_x = cast_x.detach()
        return CachedHidden(weakref.ref(x, self._forget), input_state(x), cast_x, input_gradient, hidden)

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self.cached is not None and self.cached.x is x:
            self.cached = None

    def __getstate__(self) -> dict[str, object]:
        return {"adapters": self.adapters, "cached": None}
