"""Which base an adapter was trained on: two sums for every frozen parameter, one of which survives a cast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.bits import checksum
from lightning_lora.freeze import trained_parameters

Fingerprint = dict[str, list[int | None]]


def fingerprint(model: nn.Module) -> Fingerprint:
    """For each frozen parameter: its sum after rounding to bf16, its exact sum, and its shape.

    The same base loaded in fp32 and in bf16 agrees in the first. A quantized parameter is known by its shape alone.
    """
    trained = {id(parameter) for _, parameter in trained_parameters(model)}
    return {name: _sums(p.detach()) for name, p in names.named_parameters(model) if id(p) not in trained}


def _sums(tensor: Tensor) -> list[int | None]:
    if tensor.is_meta or not tensor.is_floating_point():
        return [None, None, *tensor.shape]
    return [checksum(tensor.to(torch.bfloat16)), checksum(tensor), *tensor.shape]


def other_base(expected: Fingerprint, found: Fingerprint) -> str | None:
    """What tells that ``found`` is another base than ``expected``; ``None`` where it is the same to bf16."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            return f"`{name}` is only in {'the file' if name in expected else 'the model'}"
        (rounded, _, *shape), (rounded_here, _, *shape_here) = expected[name], found[name]
        if shape != shape_here:
            return f"`{name}` had shape {tuple(shape)} and has {tuple(shape_here)} here"
        if rounded is not None and rounded_here is not None and rounded != rounded_here:
            return f"`{name}` has other values"
    return None


def exactly_same(expected: Fingerprint, found: Fingerprint) -> bool:
    """Whether every bit of the two bases agrees."""
    return expected == found
