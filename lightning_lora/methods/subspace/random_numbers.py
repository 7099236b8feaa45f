"""Random numbers that are a function of a seed and a place, the same on every device and in every process.

The generators of torch give other numbers on a GPU than on a CPU, and ``torch.compile`` cannot trace them. P must be
the same wherever z is read again, so its numbers come from a hash of their places.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # of the hash "lowbias32", in which each bit of the input changes half of all


def random_bits(seed: int, places: Tensor) -> Tensor:
    """32 random bits for each of ``places``, an int32 tensor; no two places of a seed have the same bits.

    Args:
        seed: 64 bits, themselves random, as those of :func:`~lightning_lora.layers.adapter.seed_of`.
        places: it is overwritten.
    """
    first, second = map(_as_int32, MULTIPLIERS)
    bits = places.mul_(_as_int32(seed >> 32 | 1)).add_(_as_int32(seed))
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)  # the shift of a signed number copies its sign
    bits *= first
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= second
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def signs(bits: Tensor) -> Tensor:
    """1 or -1, by the lowest bit."""
    return 1 - 2 * (bits & 1)


def normals(bits: Tensor) -> Tensor:
    """Standard normal numbers in fp32, by the 24 highest bits of each (Box and Muller 1958).

    Args:
        bits: of an even number of rows.
    """
    uniform = (bits >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).add_(0.5).mul_(2**-24)
    radius, angle = uniform.chunk(2)
    radius, angle = radius.log().mul_(-2).sqrt_(), angle * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()))


def permutation(seed: int, size: int, device: torch.device) -> Tensor:
    """A random order of ``size`` places."""
    return random_bits(seed, torch.arange(size, dtype=torch.int32, device=device)).argsort()


def _as_int32(value: int) -> int:
    """The lower 32 bits of ``value`` as a signed number: products of int32 tensors wrap."""
    return ((value + 2**31) & 0xFFFFFFFF) - 2**31
