"""What adapters of layers that read the same input find of each other's work."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor

from lightning_lora.layers.adapter import Adapter
from lightning_lora.ops.compiled_input import low_rank_input
from lightning_lora.ops.dispatch import is_packing, version_of
from lightning_lora.ops.fused_linear import PLAIN, computed_dtype
from lightning_lora.ops.shared_input import FrozenWithHidden, InputGradient, LowRankInputs

WIDE = 2**22  # elements of an input from which on reading it again costs more than the sharing


@dataclass
class Shared:
    """What one layer gets of an input that several read: ``scale * A x``, its data, and where its gradient goes."""

    hidden: Tensor
    data: Tensor
    total: InputGradient
    wants_x: bool


def frozen_with_hidden(shared: Shared, weight: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The node's output."""
    given = shared.hidden, shared.data, weight, bias, B, shared.total, shared.wants_x
    y: Tensor = FrozenWithHidden.apply(*given)  # type: ignore[no-untyped-call]
    return y


@dataclass
class Reading:
    """What the first of some layers made of an input, for the others to find."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    matrices: Sequence[Tensor]
    hidden: dict[Adapter, Tensor]
    data: Tensor
    total: InputGradient

    def is_of(self, adapters: Sequence[Adapter], x: Tensor) -> bool:
        """Whether ``x`` and every A are the same and as they were, and the graph of their products is there."""
        if self.x() is not x or self.total.is_spent or self.state != state_of(adapters, x):
            return False
        return all(adapter.A is A for adapter, A in zip(adapters, self.matrices, strict=True))


def state_of(adapters: Sequence[Adapter], x: Tensor) -> tuple[object, ...]:
    """How ``x`` and every A are now, and by whom they are read: nothing is shared with another thread or stream."""
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    every_A = [(adapter.scale, *moment_of(adapter.A)) for adapter in adapters]
    return computed_dtype(x), x.grad_fn, get_ident(), stream, moment_of(x), every_A


def moment_of(tensor: Tensor) -> tuple[int, int, bool]:
    """What tells that ``tensor`` is as it was; writes through ``.data`` in place alone do not show."""
    return version_of(tensor), tensor.data_ptr(), tensor.requires_grad


class Siblings:
    """Adapters of layers that by their names read the same input; whether they do is seen at each call.

    What the first made of an input is forgotten when all have it, when the input is gone, or at the next: where one is
    never called, and no backward lets go of the input, it stays until then.

    Args:
        adapters: one of each layer, of the same ``in_features``.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)
        self.reading: Reading | None = None

    def read(self, adapter: Adapter, x: Tensor) -> Shared | None:
        """What ``adapter`` gets of ``x``, or ``None`` where nothing is shared.

        Nothing is shared while tensors for backward are packed (activation checkpointing, offloading): what was kept
        for one layer could be asked for while another is computed again; nor of an inference tensor, which has no
        version to compare.
        """
        if x.numel() < WIDE or is_packing() or not torch.is_grad_enabled() or x.is_inference():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # layers may be replayed one by one
            return None
        reading = self.reading
        if reading is None or adapter not in reading.hidden or not reading.is_of(self.adapters, x):
            if not self.can_share(adapter, x):
                return None
            self.reading = reading = self._read(x)
        hidden = reading.hidden.pop(adapter)  # once: a second call on the same input starts anew
        if not reading.hidden:
            self.reading = None
        return Shared(hidden, reading.data, reading.total, x.requires_grad)

    def traced(self, adapter: Adapter, x: Tensor) -> Tensor:
        """``A x`` of ``adapter`` while a compiler traces."""
        at = next(i for i, other in enumerate(self.adapters) if other is adapter)
        hidden: Tensor = low_rank_input(x, at, *(other.A for other in self.adapters))
        return hidden

    def can_share(self, adapter: Adapter, x: Tensor) -> bool:
        """Not for a copy of a layer that left the others behind, nor where an A is elsewhere, in part or not there."""
        every_A, device, width = [a.A for a in self.adapters], x.device, x.shape[-1]
        plain = all(type(A) in PLAIN and A.dim() == 2 and A.shape[1] == width and A.device == device for A in every_A)
        return plain and any(other is adapter for other in self.adapters)

    def _read(self, x: Tensor) -> Reading:
        total, scales = InputGradient(), tuple(adapter.scale for adapter in self.adapters)
        every_A = [adapter.A for adapter in self.adapters]
        given = x.to(computed_dtype(x))
        every_hidden = LowRankInputs.apply(given, total, scales, *every_A)  # type: ignore[no-untyped-call]
        hidden = dict(zip(self.adapters, every_hidden, strict=True))
        gone = weakref.ref(x, self._forget)
        return Reading(gone, state_of(self.adapters, x), every_A, hidden, given.detach(), total)

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self.reading is not None and self.reading.x is gone:
            self.reading = None

    def __getstate__(self) -> dict[str, object]:
        return {"adapters": self.adapters, "reading": None}
