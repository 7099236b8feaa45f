"""Cast the input of several layers once: query, key and value, or gate and up, each keep its copy for backward.

Each layer gets a tensor of its own with the same memory. So each has its own gradient, and these are summed in the
dtype of the input, as if each layer had cast it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_lora.torch_internals import apply_of, version_of

# The input that was cast last, its version, and its copy, which lives as long as a layer keeps it for backward.
_last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None


class _Cast(torch.autograd.Function):
    """``copy``, as a result of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(ctx.dtype), None


_apply = apply_of(_Cast)


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; in the memory of the last copy, if that was made of ``x`` and is still needed."""
    global _last
    if x.dtype == dtype:
        return x
    if not torch.is_grad_enabled():
        return x.to(dtype)
    copy = _copy_of(x, dtype)
    result: Tensor = _apply(x, x.detach().to(dtype) if copy is None else copy)
    _last = weakref.ref(x), version_of(x), weakref.ref(result)
    return result


def _copy_of(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    if _last is None:
        return None
    source, version, copy = _last[0](), _last[1], _last[2]()
    if source is not x or copy is None or copy.dtype != dtype or version != version_of(x) or version < 0:
        return None
    return copy
