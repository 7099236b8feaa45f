"""``W0 x + b + scale * B A x`` as one node of autograd, for plain tensors on a GPU.

At small sizes the host limits the speed of a step: it takes longer to launch these few products than a GPU to compute
them. So the node asks little, and keeps little for backward.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.ops.dispatch import MAX_R, can_use_kernels, check_unmodified, without_autocast
from lightning_lora.ops.gated_product import MIN_ELEMENTS, Factors, gradient_of_A, input_or_product, large_saved_factors
from lightning_lora.ops.packed.weight import PackedWeight, Weight, matrix_of, stored_in
from lightning_lora.ops.products import as_matrix, base_plus_low_rank, differentiable_gradients, like, matmul, scaled
from lightning_lora.torch_internals import (
    any_autocast_enabled,
    apply_of,
    is_batched,
    is_transformed,
    saved_tensors_have_hooks,
    versions_of,
)

PLAIN = {Tensor, nn.Parameter}  # not sharded, not quantized, not computed
PLAIN_CLASSES = PLAIN | {type(None)}
WEIGHT_CLASSES = PLAIN | {PackedWeight}
DEVICES = ("cuda",)  # on a CPU the last bits of a product depend on what it accumulates onto


def can_fuse(x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FusedLinear` can be used: plain tensors of one dtype, computed eagerly on a GPU.

    ``torch.func``, tracing and subclasses of tensors need the plain formula.
    """
    return (
        x.device.type in DEVICES
        and type(x) is Tensor
        and type(weight) in WEIGHT_CLASSES
        and type(bias) in PLAIN_CLASSES
        and type(A) in PLAIN_CLASSES
        and type(B) in PLAIN_CLASSES
        and (
            compute_dtype(x) == compute_dtype(stored_in(weight)) if any_autocast_enabled() else x.dtype == weight.dtype
        )
        and not (weight.requires_grad and torch.is_grad_enabled())
        and not is_transformed()  # in a trace, sizes are tensors
        and x.numel() > 0
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on ``x``: its own, or that of autocast."""
    if any_autocast_enabled() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class FusedLinear(torch.autograd.Function):
    """``W0 x + b + scale * B A dropout(x)``: one product accumulates onto the other, and no sum is read again.

    Saved for backward are ``x`` (or its two factors, where autograd keeps those anyway) and ``A x``; with dropout the
    dropped input and its mask. While hooks pack saved tensors (activation checkpointing, offloading), which takes
    longer than a small product, ``A x`` is computed again. W0, and A and B as they were cast, are kept without being
    packed: they are no activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        constants: tuple[Weight, float, Factors, float],
    ) -> Any:
        """``(..., in_features)`` to ``(..., out_features)``, with dropout in a pair with the dropped input.

        The dropped input is an output, as a second derivative goes through it.

        Args:
            ctx: the node.
            x: in the dtype of W0.
            bias: ``(out_features,)``.
            A: is cast to the dtype of ``x``.
            B: is cast likewise.
            constants: W0, the scale, the factors of ``x``, and the probability of dropout; every argument takes time.
        """
        weight, scale, factors, p = constants
        dtype = x.dtype
        cast_A, cast_B = A.to(dtype=dtype) if scale == 1 else scaled(A, scale, dtype), B.to(dtype=dtype)
        x_of_A, mask = torch.native_dropout(x, p, True) if p else (x, None)
        hidden = F.linear(x_of_A, cast_A)  # (..., r)
        kept = None if saved_tensors_have_hooks() else hidden
        if factors is None or kept is None:
            ctx.save_for_backward(x_of_A, mask, kept)
        else:
            ctx.save_for_backward(*factors, kept)
            ctx.x = weakref.ref(x)
        ctx.constants = A, B, weight, versions_of(A, B, stored_in(weight)), cast_A, cast_B, scale, p
        y = base_plus_low_rank(x, weight, bias, hidden, cast_B)
        if not p:
            return y
        ctx.set_materialize_grads(False)
        return y, x_of_A

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor | None, d_dropped: Tensor | None = None) -> Any:
        """The gradients of the inputs; those of A and B in their own dtype, summed in fp32 on a GPU."""
        if dy is None:  # only a second derivative goes this way
            dx = None if d_dropped is None else undropped(d_dropped, ctx.saved_tensors[1], ctx.constants[-1])
            return dx, None, None, None, None
        x, gate, hidden = ctx.saved_tensors
        A, B, weight, versions, cast_A, cast_B, scale, p = ctx.constants
        mask, gate = (gate, None) if p else (None, gate)
        needs_dx, needs_db, needs_dA, needs_dB, _ = ctx.needs_input_grad
        if needs_dx:
            check_unmodified(stored_in(weight), versions[2])
        again = torch.is_grad_enabled()  # this backward is differentiated again
        if again or d_dropped is not None or cast_A is A or cast_B is B:
            check_unmodified(A, versions[0])
            check_unmodified(B, versions[1])
        if again or d_dropped is not None or is_batched(dy):
            x = x if gate is None else input_or_product(ctx.x(), x, gate)
            base, low, dA, dB = differentiable_gradients(dy, x, matrix_of(weight), A, B, scale)
            low = low if d_dropped is None else low + d_dropped
            dx = base + (low if mask is None else undropped(low, mask, p))
            return dx, as_matrix(dy).sum(0) if needs_db else None, dA, dB, None
        dy = as_matrix(dy)
        d_hidden = torch.mm(dy, cast_B)  # (n, r)
        dx = None
        if needs_dx:
            low = (
                torch.mm(d_hidden, cast_A) if mask is None else undropped_product(d_hidden, cast_A, as_matrix(mask), p)
            )
            dx = like(low.addmm_(dy, matrix_of(weight)), x)
        if needs_dB and hidden is None:
            hidden = F.linear(x, cast_A)
        return (
            dx,
            dy.sum(0) if needs_db else None,
            gradient_of_A(d_hidden, x, gate, scale, A.dtype) if needs_dA else None,
            matmul(dy.t(), as_matrix(hidden), B.dtype) if needs_dB else None,
            None,
        )


def undropped(gradient: Tensor, mask: Tensor, p: float) -> Tensor:
    """The gradient of what ``torch.native_dropout`` dropped, by that of its result."""
    return gradient * mask * (1 / (1 - p)) if is_batched(gradient) else _undrop(gradient, mask, 1 / (1 - p))


def undropped_product(d_hidden: Tensor, A: Tensor, mask: Tensor, p: float) -> Tensor:
    """:func:`undropped` of ``d_hidden A``, for a gradient ``(n, r)`` of ``A x`` and a mask ``(n, in_features)``."""
    if mask.numel() >= MIN_ELEMENTS and len(A) <= MAX_R and can_use_kernels(d_hidden):
        from lightning_lora.ops import dropout_kernels

        return dropout_kernels.undropped_product(d_hidden, A, mask, 1 / (1 - p))
    dx: Tensor = _undrop(torch.mm(d_hidden, A), mask, 1 / (1 - p))
    return dx


_undrop = torch.ops.aten.native_dropout_backward.default
_apply = apply_of(FusedLinear)


def fused_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """The output of :class:`FusedLinear`, with dropout of probability ``p`` on the input of A."""
    factors = None if p else large_saved_factors(x)
    if factors is not None and A.size(0) > MAX_R:
        factors = None
    y: Any = _apply(x, bias, A, B, (weight, scale, factors, p))
    output: Tensor = y[0] if p else y
    return output
