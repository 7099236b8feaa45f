"""Layers that share an input, under a compiler: one product with the stacked A of all.

A compiler merges equal products by itself, but neither the products of several A with one input nor their gradients.
The cache exists only while a graph is traced; a compiled graph does not use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.torch_internals import saved_tensors_have_hooks, version_of


@dataclass
class CachedHidden:
    """``A x`` of an input for every A that was not yet asked for, by index."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    hidden: dict[int, Tensor]


cache: list[CachedHidden] = []  # at most one


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def hidden_while_compiling(x: Tensor, index: int, *all_A: Tensor) -> Tensor:
    """``A x`` for the A at ``index``, of shape ``(..., r)``; the first call with an ``x`` computes it for every A.

    The graph holds this function as one call. The layers of the compiler below run it again and again with tensors of
    their own; there identity and version show that the next call has the same ``x``.
    """
    if x.is_inference() or saved_tensors_have_hooks():  # no version to compare; nothing may be kept for another call
        return F.linear(x, all_A[index].to(x.dtype))
    state = input_state(x, all_A)
    cached = cache.pop() if cache else None
    if cached is None or cached.x() is not x or cached.state != state or index not in cached.hidden:
        stacked = F.linear(x, torch.cat(all_A).to(x.dtype))  # (..., sum of r)
        split = torch.split(stacked, [len(A) for A in all_A], dim=-1)
        cached = CachedHidden(weakref.ref(x, lambda _: cache.clear()), state, dict(enumerate(split)))
    hidden = cached.hidden.pop(index)
    if cached.hidden:
        cache.append(cached)
    return hidden


def input_state(x: Tensor, all_A: Sequence[Tensor]) -> tuple[object, ...]:
    """All that must be unchanged for the cached products to be valid."""
    device = x.device.type
    mode = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return (*mode, version_of(x), *((id(A), version_of(A)) for A in all_A))
