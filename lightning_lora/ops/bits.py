"""Tensors compared by their bits: -0 is not 0, and a NaN equals itself."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 15  # elements worked on at once on a CPU: they stay in its cache, and one thread does them
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 / golden ratio as a signed integer: an odd factor loses no bit of a product


def bits(tensor: Tensor) -> Tensor:
    """``tensor`` seen as integers of its width."""
    return tensor.detach().view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, wherever they live."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach().reshape(-1), other.detach().to(one.device).reshape(-1)
    return torch.equal(bits(one), bits(other))


def checksum(tensor: Tensor) -> int:
    """A 64-bit sum over words and their places, the same on every device; a change of any one word changes it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    words = raw.view(torch.int64)
    factors = _odd_numbers(BLOCK, words.device) * _ODD
    rows = 1 if words.device.type == "cpu" else 128
    sums = [_weighted(words[start : start + rows * BLOCK], factors) for start in range(0, words.numel(), rows * BLOCK)]
    total = torch.cat(sums) if sums else words.new_zeros(0)
    return int(_mixed(total, _odd_numbers(total.numel(), words.device) * _ODD).sum())


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return 2 * torch.arange(count, device=device) + 1


def _weighted(words: Tensor, factors: Tensor) -> Tensor:
    """For each block of ``words`` the sum of its mixed products with ``factors``; the last block may be short."""
    if words.numel() % len(factors):
        whole = words.numel() // len(factors) * len(factors)
        rest = _mixed(words[whole:], factors[: words.numel() - whole]).sum().view(1)
        return torch.cat([_weighted(words[:whole], factors), rest]) if whole else rest
    return _mixed(words.view(-1, len(factors)), factors).sum(1)


def _mixed(words: Tensor, factors: Tensor) -> Tensor:
    """Products folded on themselves, one to one: without the fold two words of opposite sign could change places."""
    products = words * factors
    return products ^ (products >> 32)
