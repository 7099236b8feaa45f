"""Which base an adapter was trained on: sums of every frozen parameter, two of which survive a cast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_parameters, shape_of
from lightning_lora.model.freeze import trained_parameters
from lightning_lora.ops.exact_sum import checksum

Fingerprint = dict[str, list[int | None]]


def fingerprint(model: nn.Module, device: torch.device | str | None = None) -> Fingerprint:
    """For each frozen parameter: its sums after rounding to bf16 and to fp16, its exact sum, and its shape.

    The same base loaded in fp32 and in bf16 agrees in the first, in fp32 and in fp16 in the second. A quantized
    parameter is known by its shape alone. Every rank must call it: sharded parameters are gathered one by one.

    Args:
        model: with adapters, live or merged, or without.
        device: where to sum, one parameter at a time; a CPU takes half a minute for 7 B parameters.
    """
    trained = {name for name, _ in trained_parameters(model)}
    return {name: sums_of(value, device) for name, value in full_parameters(model) if name not in trained}


def sums_of(tensor: Tensor, device: torch.device | str | None = None) -> list[int | None]:
    """What :func:`fingerprint` has of one parameter."""
    if tensor.is_meta or not tensor.is_floating_point():
        return [None, None, None, *shape_of(tensor)]
    tensor = tensor if device is None else tensor.to(device)
    sums = {dtype: checksum(tensor.to(dtype)) for dtype in (torch.bfloat16, torch.float16)}
    exact = sums[tensor.dtype] if tensor.dtype in sums else checksum(tensor)
    return [sums[torch.bfloat16], sums[torch.float16], exact, *tensor.shape]


def other_base(expected: Fingerprint, found: Fingerprint) -> str | None:
    """What tells that ``found`` is another base than ``expected``; ``None`` where it is the same but for a cast."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            return f"`{name}` is only in {'the file' if name in expected else 'the model'}"
        (*rounded, _), shape = expected[name][:3], expected[name][3:]
        (*rounded_here, _), shape_here = found[name][:3], found[name][3:]
        if shape != shape_here:
            return f"`{name}` had shape {tuple(shape)} and has {tuple(shape_here)} here"
        known = None not in (*rounded, *rounded_here)
        if known and not any(one == other for one, other in zip(rounded, rounded_here, strict=True)):
            return f"`{name}` has other values"
    return None


def exactly_same(expected: Fingerprint, found: Fingerprint) -> bool:
    """Whether every bit of the two bases agrees."""
    return expected == found
