"""The formula of the method: the frozen map, and the low-rank term added to it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + b`` with the bits that torch gives for a weight that trains.

    Of strided input with three or more dimensions ``torch.nn.functional.linear`` makes another product when the weight
    asks for no gradient: one for each batch, where it makes a single one of a copy. A's product needs that copy anyway.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.
    """
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    y = F.linear(x.contiguous(), weight)
    return y if bias is None else y + bias.to(y.dtype)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale * B A x`` (Hu et al. 2021, equation 3).

    A and B are fp32 whatever the model's dtype; they are cast to the activations' dtype, never the other way round:
    casting activations up costs more time and memory than the whole backbone's weight gradients.

    Args:
        y: the frozen layer's output, ``(..., out_features)``.
        x: its input, ``(..., in_features)``.
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        scale: ``alpha / r``.

    Example:
        >>> import torch
        >>> A, B, x = torch.ones(1, 2), torch.ones(3, 1), torch.ones(2)
        >>> add_low_rank(torch.zeros(3), x, A, B, scale=0.5)
        tensor([1., 1., 1.])
    """
    return add_hidden(y, F.linear(x, A.to(x.dtype)), B, scale)


def add_hidden(y: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale * B h`` for ``h = A x`` of shape ``(..., r)``."""
    B = B if scale == 1 else scale * B  # at small sizes a step is bound by the number of kernels
    return y + F.linear(hidden, B.to(hidden.dtype)).to(y.dtype)
