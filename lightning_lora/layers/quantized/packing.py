"""How bitsandbytes keeps a 4-bit weight in the memory of a CPU: a model with adapters keeps the form for training.

On a CPU with AVX512-BF16, the first evaluation of a 4-bit layer packs its weight again for a kernel that computes in
bf16 and has no backward pass. The largest value of each block is rounded to bf16 then. A later training step has no
gradient through the layer, or raises, and ``state_dict()`` leaves blocks with the values of others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.quantized.formats import (
    codes_packed_for_cpu,
    is_packed_for_cpu,
    is_quantized,
    quantization_of,
)
from lightning_lora.names import counted

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' name for whether an evaluation packs the layer's weight


def packs_for_evaluation(module: nn.Module) -> bool:
    """Whether an evaluation on a CPU would pack the weight of ``module``."""
    return is_quantized(module) and bool(getattr(module, PACKS, False))


def keep_for_training(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Let no evaluation pack the weights of ``layers``, which come with their names, and unpack those that are packed.

    The layers have :func:`packs_for_evaluation`.
    """
    unpacked = []
    for name, layer in layers:
        setattr(layer, PACKS, False)
        if _unpack(layer):
            unpacked.append(name)
    if unpacked:
        warnings.warn(
            f"{counted(len(unpacked), '4-bit layer')} of the model ran in evaluation before the adapters came, such as "
            f"`{unpacked[0]}`, and bitsandbytes rounded the largest value of each of their blocks to bf16 then. The "
            "adapters act on the rounded weights, not on those that a fresh load gives. Load the model again, and "
            "adapt it before its first evaluation.",
            stacklevel=2,
        )


def let_pack(layer: nn.Module) -> None:
    """Let an evaluation pack the weight of ``layer`` again."""
    setattr(layer, PACKS, True)


def _unpack(layer: nn.Module) -> bool:
    """Store a packed 4-bit weight as for training; whether it was ever packed. ``state_dict()`` unpacks a part."""
    weight: Any = layer._parameters["weight"]
    state = quantization_of(layer)
    originals = [] if state is None else [key for key in vars(state) if key.startswith("original_")]
    if not originals:
        return False
    if is_packed_for_cpu(state):
        weight.data = _unpacked(weight.data, state)
        state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.t().reshape(-1).float()
        state.nested, state.offset, state.state2 = False, None, None
    for key in originals:
        delattr(state, key)
    return True


def _unpacked(codes: Tensor, state: Any) -> Tensor:
    """The codes in the order of the matrix, two in a byte, the first in the high half."""
    pairs = codes_packed_for_cpu(codes, state).view(-1, 2)
    packed = (pairs[:, 0] << 4 | pairs[:, 1]).view(state.original_qshape)
    return packed.view(getattr(state, "original_storage_type", torch.uint8))
