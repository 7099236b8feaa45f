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

from lightning_lora.ops.dispatch import MAX_R, check_unmodified, without_autocast
from lightning_lora.ops.gated_product import Factors, gradient_of_A, input_or_product, large_saved_factors
from lightning_lora.ops.products import as_matrix, base_plus_low_rank, differentiable_gradients, like, matmul, scaled
from lightning_lora.torch_internals import (
    any_autocast_enabled,
    apply_of,
    is_batched,
    is_transformed,
    saved_tensors_have_hooks,
    versions_of,
)

PLAIN_CLASSES = {Tensor, nn.Parameter, type(None)}
DEVICES = ("cuda",)  # on a CPU the last bits of a product depend on what it accumulates onto


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether :class:`FusedLinear` can be used: plain tensors of one dtype, computed eagerly on a GPU.

    ``torch.func``, tracing and subclasses of tensors need the plain formula.
    """
    return (
        x.device.type in DEVICES
        and type(x) is Tensor
        and type(weight) in PLAIN_CLASSES
        and type(bias) in PLAIN_CLASSES
        and type(A) in PLAIN_CLASSES
        and type(B) in PLAIN_CLASSES
        and (compute_dtype(x) == compute_dtype(weight) if any_autocast_enabled() else x.dtype == weight.dtype)
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
    """``W0 x + b + scale * B A x``: one product accumulates onto the other, so no sum is written and read again.

    Saved for backward are ``x`` (or its two factors, where autograd keeps those anyway) and ``A x``. While hooks pack
    saved tensors (activation checkpointing, offloading), which takes longer than a small product, it is ``x`` alone.
    W0, and A and B as they were cast, are kept without being packed: they are no activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        constants: tuple[Tensor, float, Factors],
    ) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Args:
            ctx: the node.
            x: in the dtype of W0.
            dropped: the input of A with dropout; ``None`` if it is ``x``.
            bias: ``(out_features,)``.
            A: is cast to the dtype of ``x``.
            B: is cast likewise.
            constants: W0, the scale, and the factors of ``x``; every argument takes time.
        """
        weight, scale, factors = constants
        dtype = x.dtype
        cast_A, cast_B = A.to(dtype=dtype) if scale == 1 else scaled(A, scale, dtype), B.to(dtype=dtype)
        x_of_A = x if dropped is None else dropped
        hidden = F.linear(x_of_A, cast_A)  # (..., r)
        if saved_tensors_have_hooks():
            ctx.save_for_backward(x_of_A, None, None)
        elif factors is None:
            ctx.save_for_backward(x_of_A, None, hidden)
        else:
            ctx.save_for_backward(*factors, hidden)
            ctx.x = weakref.ref(x)
        ctx.constants = A, B, weight, versions_of(A, B, weight), cast_A, cast_B, scale
        return base_plus_low_rank(x, weight, bias, hidden, cast_B)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of the inputs; those of A and B in their own dtype, summed in fp32 on a GPU."""
        x, gate, hidden = ctx.saved_tensors
        A, B, weight, versions, cast_A, cast_B, scale = ctx.constants
        needs_dx, needs_dropped, needs_db, needs_dA, needs_dB, _ = ctx.needs_input_grad
        if needs_dx:
            check_unmodified(weight, versions[2])
        again = torch.is_grad_enabled()  # this backward is differentiated again
        if again or cast_A is A or cast_B is B:
            check_unmodified(A, versions[0])
            check_unmodified(B, versions[1])
        if again or is_batched(dy):
            x = x if gate is None else input_or_product(ctx.x(), x, gate)
            base, low, dA, dB = differentiable_gradients(dy, x, weight, A, B, scale)
            dx_and_dropped = (base, low) if needs_dropped else (base + low, None)
            return *dx_and_dropped, as_matrix(dy).sum(0) if needs_db else None, dA, dB, None
        dy = as_matrix(dy)
        d_hidden = torch.mm(dy, cast_B)  # (n, r)
        dx: Tensor | None = None
        d_dropped: Tensor | None = None
        if needs_dropped:
            d_dropped, dx = like(torch.mm(d_hidden, cast_A), x), like(torch.mm(dy, weight), x)
        elif needs_dx:
            dx = like(torch.mm(d_hidden, cast_A).addmm_(dy, weight), x)
        if needs_dB and hidden is None:
            hidden = F.linear(x, cast_A)
        return (
            dx,
            d_dropped,
            dy.sum(0) if needs_db else None,
            gradient_of_A(d_hidden, x, gate, scale, A.dtype) if needs_dA else None,
            matmul(dy.t(), as_matrix(hidden), B.dtype) if needs_dB else None,
            None,
        )


_apply = apply_of(FusedLinear)


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """The output of :class:`FusedLinear`."""
    factors = large_saved_factors(x) if dropped is None else None
    if factors is not None and A.size(0) > MAX_R:
        factors = None
    y: Tensor = _apply(x, dropped, bias, A, B, (weight, scale, factors))
    return y
