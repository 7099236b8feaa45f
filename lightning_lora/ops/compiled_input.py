"""Layers that read the same input, while a compiler traces them: one product for all of their A, as in eager mode.

The compiler merges equal products by itself, but not those of several A with one input, nor their gradients. What is
kept from one call for the next is kept while a graph is traced, and never in a graph that runs.
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
class Traced:
    """The products of an input with every A, those that were not yet asked for, by index."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    products: dict[int, Tensor]


last: list[Traced] = []  # one at most


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def low_rank_input(x: Tensor, index: int, *every_A: Tensor) -> Tensor:
    """``A x`` of the A at ``index``, of shape ``(..., r)``; the first call on an ``x`` makes those of all.

    A function that the graph holds as one call: what is under the compiler runs it with tensors of its own, again and
    again, and finds there by identity and version that the next call has the same ``x``.
    """
    if x.is_inference() or saved_tensors_have_hooks():  # no version to compare, or nothing to be kept for another call
        return F.linear(x, every_A[index].to(x.dtype))
    state = state_of(x, every_A)
    found = last.pop() if last else None
    if found is None or found.x() is not x or found.state != state or index not in found.products:
        product = F.linear(x, torch.cat(every_A).to(x.dtype))
        split = torch.split(product, [len(A) for A in every_A], dim=-1)
        found = Traced(weakref.ref(x, lambda _: last.clear()), state, dict(enumerate(split)))
    mine = found.products.pop(index)
    if found.products:
        last.append(found)
    return mine


def state_of(x: Tensor, every_A: Sequence[Tensor]) -> tuple[object, ...]:
    """What must be as it was for the products to be the same."""
    device = x.device.type
    mode = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return (*mode, version_of(x), *((id(A), version_of(A)) for A in every_A))
