"""A linear layer with LoRA: ``h = W0 x + b + scale * B A x`` (Hu et al. 2021, equation 3).

Linear layers call :func:`linear`. It decides how the sum is computed: as one node of autograd where that is
possible, otherwise as the base output plus the low-rank term of each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops.fused_linear import PLAIN_CLASSES, can_fuse, compute_dtype, fused_linear
from lightning_lora.ops.mixed_linear import can_mix, mixed_linear
from lightning_lora.ops.mixed_products import PairCopies
from lightning_lora.ops.mixture import Mixture
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor, quantized_linear
from lightning_lora.ops.packed.weight import PackedWeight, Weight
from lightning_lora.ops.shared_input import HasA, SharedInputGroup
from lightning_lora.torch_internals import any_autocast_enabled

Coefficient = Tensor | float | None  # of ``B A x`` for each sample, or for all of them; ``None`` is 1


class Pair(HasA, Protocol):
    """A and B of one adapter, and what decides how their term is computed.

    Calling a pair runs the hooks of its module, which the fused op does not.
    """

    scale: float
    dropout: float
    training: bool
    shared_input: SharedInputGroup | None

    @property
    def B(self) -> Tensor:
        """``(out_features, r)``, or fewer rows where only some rows of W0 are adapted."""

    def operands(self) -> tuple[Tensor, Tensor] | None:
        """A and B for the fused op, which does not call the pair.

        ``None`` if a hook expects calls, or only some rows of W0 are adapted.
        """

    def placed_B(self, out_features: int) -> Tensor:
        """B of shape ``(out_features, r)``, zero in the rows that are not adapted."""

    def __call__(self, y: Tensor, x: Tensor, coefficient: Coefficient = None) -> Tensor:
        """``y`` plus the low-rank term for ``x``: :func:`add_pair` between the hooks of the module."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Sequence[Pair]) -> Tensor:
    """``W0 x + b`` plus ``scale * B A dropout(x)`` for each pair.

    Args:
        x: ``(..., in_features)``.
        weight: W0, frozen, ``(out_features, in_features)``.
        bias: ``(out_features,)``.
        pairs: the active adapters; without any the result is the base output, bit for bit.

    Returns:
        ``(..., out_features)``.

    Example:
        >>> import torch
        >>> linear(torch.tensor([1.0, 2.0]), torch.eye(2), None, [])
        tensor([1., 2.])
    """
    if len(pairs) == 1 and not torch.compiler.is_dynamo_compiling():  # a compiler fuses the plain formula better
        fused = _fused(x, weight, bias, pairs[0])
        if fused is not None:
            return fused
    y = base_linear(x, weight, bias)
    for pair in pairs:
        y = pair(y, x)
    return y


def linear_by_choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[tuple[Pair, Coefficient]]
) -> Tensor:
    """As :func:`linear`, of pairs that act with coefficients."""
    if all(coefficient is None for _, coefficient in terms):
        return linear(x, weight, bias, [pair for pair, _ in terms])
    fused = fuse(x, weight, bias, terms)
    if fused is not None:
        return fused
    y = base_linear(x, weight, bias)
    for pair, coefficient in terms:
        y = pair(y, x, coefficient)
    return y


def fuse(x: Tensor, weight: Weight, bias: Tensor | None, terms: Sequence[tuple[Pair, Coefficient]]) -> Tensor | None:
    """As :func:`linear_by_choice`, as one node of autograd; ``None`` where that is not possible."""
    if len(terms) != 1:
        return None
    ((pair, coefficient),) = terms
    if coefficient is None:
        return _fused(x, weight, bias, pair)
    return _fused(x, weight, bias, pair, coefficient) if isinstance(coefficient, float) else None


def fuse_mixed(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    mixture: Mixture,
    p: float,
    copies_of: Callable[[Sequence[Tensor], torch.dtype], PairCopies],
) -> Tensor | None:
    """The sum of a batch whose samples use different adapters, as one node of autograd.

    Args:
        x: ``(samples, ..., in_features)``.
        weight: as of :func:`linear`.
        bias: as of :func:`linear`.
        matrices: every A, then every B.
        scales: of each pair.
        mixture: which samples use which pair.
        p: probability of dropout.
        copies_of: gives the copies of ``matrices`` in the dtype of the products.

    Returns:
        ``None`` where one node is not possible.
    """
    if not can_mix(x, weight, bias, matrices, mixture):
        return None
    x, weight, bias = _cast_by_autocast(x, weight, bias)
    return mixed_linear(x, weight, bias, matrices, scales, mixture, p, copies_of(matrices, x.dtype))


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W0 x + b`` with the bits that torch gives for a weight that requires a gradient.

    For strided input of three or more dimensions ``torch.nn.functional.linear`` computes one product per batch when the
    weight requires no gradient, and a single product of a copy when it does. The product with A needs that copy anyway.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``.
    """
    if type(weight) not in PLAIN_CLASSES and is_quantized_tensor(weight):
        return quantized_linear(x, weight, bias)
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    y = F.linear(x.contiguous(), weight)
    return y if bias is None else y + bias.to(y.dtype)


def add_pair(y: Tensor, x: Tensor, pair: Pair, coefficient: Coefficient = None) -> Tensor:
    """``y + scale * B (c * (A dropout(x)))``, as separate operations of torch.

    A and B are fp32 whatever the model's dtype; they are cast to the activations' dtype, never the other way round:
    casting activations up costs more time and memory than all weight gradients of the backbone.

    Args:
        y: base output, ``(..., out_features)``.
        x: input of the layer, ``(..., in_features)``.
        pair: A and B.
        coefficient: c, ``(batch, 1, ...)``, one number, or ``None`` for 1.
    """
    B, p = pair.placed_B(y.shape[-1]), pair.dropout if pair.training else 0.0
    group = pair.shared_input if torch.compiler.is_compiling() and not p else None
    if group is not None and group.can_share(pair, x):
        hidden = group.hidden_while_compiling(pair, x)
        return add_low_rank_term(y, weighed(hidden, coefficient), B, pair.scale)
    dropped = F.dropout(x, p) if p else x
    hidden = F.linear(dropped, pair.A.to(x.dtype))  # (..., r)
    return add_low_rank_term(y, weighed(hidden, coefficient), B, pair.scale)


def add_low_rank_term(y: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale * B h`` for ``h = A x`` of shape ``(..., r)``.

    Example:
        >>> import torch
        >>> add_low_rank_term(torch.zeros(3), torch.tensor([2.0]), torch.ones(3, 1), scale=0.5)
        tensor([1., 1., 1.])
    """
    B = B if scale == 1 else scale * B  # at small sizes the number of kernels limits the speed of a step
    return y + F.linear(hidden, B.to(hidden.dtype)).to(y.dtype)


def weighed(hidden: Tensor, coefficient: Coefficient) -> Tensor:
    """``c * h`` for ``h = A x``.

    Args:
        hidden: ``(batch, ..., r)``, or ``(batch, r, ...)`` of a convolution.
        coefficient: ``(batch, 1, ...)``, one number, or ``None`` for 1.
    """
    if coefficient is None:
        return hidden
    return hidden * (coefficient.to(hidden.dtype) if isinstance(coefficient, Tensor) else coefficient)


def _cast_by_autocast(x: Tensor, weight: Weight, bias: Tensor | None) -> tuple[Tensor, Weight, Tensor | None]:
    """The operands of an op that autocast does not cast, ``x`` contiguous."""
    if any_autocast_enabled() and not isinstance(weight, PackedWeight):
        dtype = compute_dtype(x)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x if x.is_contiguous() else x.contiguous(), weight, bias  # once for every product


def _fused(x: Tensor, weight: Weight, bias: Tensor | None, pair: Pair, coefficient: float = 1.0) -> Tensor | None:
    """The sum as one node of autograd; ``None`` where that is not possible."""
    operands = pair.operands()
    if operands is None or not can_fuse(x, weight, bias, *operands):
        return None
    if any_autocast_enabled() or not x.is_contiguous():
        x, weight, bias = _cast_by_autocast(x, weight, bias)
    return fused_linear(x, weight, bias, *operands, coefficient * pair.scale, pair.dropout if pair.training else 0.0)
