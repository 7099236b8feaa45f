"""Layers that read the same input, while a compiler traces them: one product for all of their A, as in eager mode.

The compiler merges equal products by itself, but not those of several A with one input, nor their gradients. What is
kept from one call for the next is kept while a graph is traced, and never in a graph that runs.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

found: dict[str, tuple[weakref.ref[Tensor], tuple[object, ...], dict[int, Tensor]]] = {}


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def low_rank_input(x: Tensor, index: int, *every_A: Tensor) -> Tensor:
    """``A x`` of the A at ``index``, of shape ``(..., r)``; the first call on an ``x`` makes those of all.

    A function that the graph holds as one call: what is under the compiler runs it with tensors of its own, again and
    again, and finds there by identity and version that the next call has the same ``x``.
    """
    if x.is_inference():
        return F.linear(x, every_A[index].to(x.dtype))
    mode = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
    state = (*mode, x._version, *((id(A), A._version) for A in every_A))
    known, when, products = found.pop("last", (None, None, {}))
    if known is None or known() is not x or when != state or index not in products:
        product = F.linear(x, torch.cat(every_A).to(x.dtype))
        split = torch.split(product, [len(A) for A in every_A], dim=-1)
        known, products = weakref.ref(x, lambda _: found.clear()), dict(enumerate(split))
    product = products.pop(index)
    if products:
        found["last"] = (known, state, products)
    return product
