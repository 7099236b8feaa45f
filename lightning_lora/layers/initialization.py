"""The values that A starts from; B starts from zero."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor


def default_seed() -> int:
    """The seed that Lightning's ``seed_everything`` left in the environment, else 0."""
    value = os.environ.get("PL_GLOBAL_SEED", "")
    return int(value) if value.lstrip("-").isdigit() else 0


def seed_of(seed: int | None, layer: str, adapter: str) -> int:
    """A seed for one adapter of one layer, the same in every process and whatever was injected before it."""
    text = f"{default_seed() if seed is None else seed}/{layer}/{adapter}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def initial_A(shape: Sequence[int], init: str, seed: int) -> Tensor:
    """A as it starts, in fp32 on the CPU, from a generator of its own.

    Args:
        shape: ``(r, in_features)``, or ``(experts, r, in_features)``.
        init: ``"kaiming"``: uniform in +-1/sqrt(in_features), as the weight of ``nn.Linear``; ``"gaussian"``: normal
            with standard deviation 1/r. The paper (section 4.1) says only "random Gaussian".
        seed: of the generator; the global random stream is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    r, in_features = shape[-2:]
    if init == "gaussian":
        return torch.empty(*shape, device="cpu", dtype=torch.float32).normal_(0, 1 / r, generator=generator)
    bound = 1 / math.sqrt(max(1, in_features))
    return torch.empty(*shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)
