"""Do not save ``act(gate) * up``, the input of a gated MLP's last layer: autograd already keeps both factors.

It is the widest input in a transformer block. Only the gradient of A needs it, and computes it from the factors, which
autograd saved for the multiplication itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import can_use_kernels, supports_kernels
from lightning_lora.ops.products import HALF_DTYPES, as_matrix, matmul
from lightning_lora.torch_internals import factors_of_product, has_tensor_hooks, saved_tensors_have_hooks, version_of

Factors = tuple[Tensor, Tensor] | None
MIN_ELEMENTS = 2**23  # below this the saved memory is not worth a kernel


def large_saved_factors(x: Tensor) -> Factors:
    """:func:`saved_factors` where ``x`` is large and the kernels can be used."""
    if x.numel() < MIN_ELEMENTS or not x.is_cuda or x.dtype not in HALF_DTYPES or not supports_kernels(x.get_device()):
        return None
    return saved_factors(x)


def saved_factors(x: Tensor) -> Factors:
    """The two tensors, of the shape of ``x``, whose product it is and which autograd saved both.

    ``None`` while hooks pack saved tensors (activation checkpointing, offloading): reading them would unpack them.
    """
    if version_of(x):  # modified in place, x is no product any more
        return None
    if saved_tensors_have_hooks() or has_tensor_hooks(x):
        return None
    try:
        factors = factors_of_product(x)
    except RuntimeError:  # a factor was modified in place: the error is for backward to raise
        return None
    if factors is None:
        return None
    gate, up = factors
    return (gate, up) if gate is not None and up is not None and _alike(gate, x) and _alike(up, x) else None


def _alike(factor: Tensor, x: Tensor) -> bool:
    return factor.shape == x.shape and factor.dtype == x.dtype and factor.is_contiguous()


def input_or_product(x: Tensor | None, gate: Tensor, up: Tensor) -> Tensor:
    """``x`` if it still exists unmodified, as a second derivative may be taken by it, else the product again."""
    return x if x is not None and not version_of(x) else gate * up


def gradient_of_A(d_hidden: Tensor, x: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * d_hidden^T x`` in ``dtype``, or ``scale * d_hidden^T (x * gate)``.

    Args:
        d_hidden: gradient of ``A x``, ``(n, r)``.
        x: input, or its first factor, ``(..., in_features)``.
        gate: the second factor.
        scale: in front of ``B A``.
        dtype: of the result, ``(r, in_features)``.
    """
    if gate is not None and can_use_kernels(d_hidden):
        from lightning_lora.ops import gated_kernels as kernels

        return kernels.gated_gradient(d_hidden, as_matrix(x), as_matrix(gate), scale, dtype)
    dA = matmul(d_hidden.t(), as_matrix(x if gate is None else x * gate), dtype)
    return dA if scale == 1 else dA.mul_(scale)
