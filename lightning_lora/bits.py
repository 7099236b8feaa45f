"""Tensors compared by their bits: -0 is not 0, and a NaN equals itself."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 / golden ratio as a signed integer: an odd factor loses no bit of a product
_BLOCK = 1 << 22


def bits(tensor: Tensor) -> Tensor:
    """``tensor`` seen as integers of its width."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, wherever they live."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(bits(one.contiguous()), bits(other.to(one.device).contiguous()))


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum over position and bits, the same on every device; any single change changes it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    words = raw.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK]
        place = torch.arange(start, start + block.numel(), device=block.device)
        total += (block * ((2 * place + 1) * _ODD)).sum()
    return int(total)
