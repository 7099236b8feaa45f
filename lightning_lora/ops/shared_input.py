"""Layers that share an input (query, key and value; gate and up), under a compiler: ``A x`` of all is one product.

A compiled step of a 1.1 B model took 91.6 ms with it and 94.3 ms without. In eager mode each layer computes its own:
there sharing changed no step of that model by more than the noise of 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_lora.ops.fused_linear import PLAIN_CLASSES


class HasA(Protocol):
    """What the layers that share an input must know of each other."""

    @property
    def A(self) -> Tensor:
        """``(r, in_features)``."""


class SharedInputGroup:
    """Adapters of layers that, by their names, share an input; whether they do is checked at each call.

    Args:
        adapters: one per layer, all with the same ``in_features``.
    """

    def __init__(self, adapters: Sequence[HasA]) -> None:
        self.adapters = list(adapters)

    def can_share(self, adapter: HasA, x: Tensor) -> bool:
        """Whether every A is a plain matrix on the device of ``x``, and ``adapter`` itself is in the group."""
        for A in (member.A for member in self.adapters):
            if type(A) not in PLAIN_CLASSES or A.dim() != 2 or A.shape[1] != x.shape[-1] or A.device != x.device:
                return False
        return any(member is adapter for member in self.adapters)

    def hidden_while_compiling(self, adapter: HasA, x: Tensor) -> Tensor:
        """``A x`` of ``adapter``, ``(..., r)``, while a compiler traces."""
        from lightning_lora.ops.compiled_input import hidden_while_compiling  # imports the compiler: 1.5 s

        index = next(i for i, member in enumerate(self.adapters) if member is adapter)
        hidden: Tensor = hidden_while_compiling(x, index, *(member.A for member in self.adapters))
        return hidden
