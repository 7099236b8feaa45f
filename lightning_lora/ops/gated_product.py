"""An input that is a product, as a gated MLP's: its factors are kept for backward anyway, and it need not be.

``act(gate(x)) * up(x)`` is the widest input in a transformer block, and no frozen layer needs it in backward. A's
gradient does; it is computed from the factors, which autograd keeps for the multiplication itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import kernels_serve, runs_kernels
from lightning_lora.ops.products import HALVES, product, rows_of, scaled
from lightning_lora.torch_internals import factors_of_product, has_tensor_hooks, saved_tensors_have_hooks, version_of

Factors = tuple[Tensor, Tensor] | None
WIDE = 2**23  # elements from which on the memory is worth a kernel


def factors_of(x: Tensor) -> Factors:
    """As :func:`kept_factors`, where the memory is worth a kernel and one serves."""
    if x.numel() < WIDE or not x.is_cuda or x.dtype not in HALVES or not runs_kernels(x.get_device()):
        return None
    return kept_factors(x)


def kept_factors(x: Tensor) -> Factors:
    """The two tensors, shaped alike, that ``x`` was multiplied from, where autograd keeps both.

    Not while tensors for backward are packed (activation checkpointing, offloading), where asking for them unpacks.
    """
    if saved_tensors_have_hooks() or has_tensor_hooks(x) or version_of(x):  # written in place, x is no product any more
        return None
    try:
        factors = factors_of_product(x)
    except RuntimeError:  # a factor was changed in place since: the error is for backward to raise
        return None
    if factors is None:
        return None
    gate, up = factors
    return (gate, up) if gate is not None and up is not None and _alike(gate, x) and _alike(up, x) else None


def _alike(factor: Tensor, x: Tensor) -> bool:
    return factor.shape == x.shape and factor.dtype == x.dtype and factor.is_contiguous()


def multiplied(x: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """``x`` itself, if somebody still has it who may differentiate by it, else the product again."""
    return x if x is not None and not version_of(x) else one * other


def gradient_of_A(back: Tensor, x: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * back^T x`` in ``dtype``, or ``scale * back^T (x * gate)``."""
    if gate is not None and kernels_serve(x):
        from lightning_lora.ops import gated_kernels as kernels

        return kernels.gated_gradient(back, rows_of(x), rows_of(gate), scale, dtype)
    return scaled(product(back.t(), rows_of(x if gate is None else x * gate), dtype), scale, dtype)
