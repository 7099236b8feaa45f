"""For which weights and inputs it is faster to sum the weights than to compute the low-rank terms."""

from __future__ import annotations

from torch import Tensor

from lightning_lora.ops import dispatch
from lightning_lora.torch_internals import saved_tensors_have_hooks

MAX_WORK = 4 * 10**10  # multiplications for the gradient of one weight; with more, the other side is faster
MAX_CHECKPOINTED_WORK = 16 * 10**10  # where activation checkpointing computes a forward twice, and packs what it saves
MAX_ELEMENTS = 2**25  # of one weight; the sum of a larger one costs more than the launches that it saves


def is_ever_faster(x: Tensor) -> bool:
    """Whether sums are faster for some inputs on the device of ``x``: launching a kernel takes longer than its work."""
    return x.is_cuda or x.device.type in dispatch.DEVICES


def is_faster(size: int, rows: float) -> bool:
    """Whether the sum of a weight of ``size`` elements is faster than the other side, for an input of ``rows`` rows."""
    work = rows * size
    if size > MAX_ELEMENTS or work > MAX_CHECKPOINTED_WORK:
        return False
    return work <= MAX_WORK or saved_tensors_have_hooks()
