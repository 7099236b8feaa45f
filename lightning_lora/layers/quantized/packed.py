"""A quantized layer as the fused ops see it: a weight that they compute where a product needs it."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_lora.foreign import PRODUCT_BY_CODES, QUANTIZING_LIBRARY
from lightning_lora.layers.quantized.formats import dequantized_int8, int8_of, is_packed_for_cpu, quantization_of
from lightning_lora.ops import fused_linear
from lightning_lora.ops.packed.four_bits import FourBits, dequantize_4bit
from lightning_lora.ops.packed.weight import PackedWeight
from lightning_lora.torch_internals import any_autocast_enabled

MAX_ROWS_BY_CODES = 1536  # for more rows bitsandbytes computes the matrix of a 4-bit weight first


def packed_weight(module: Any, x: Tensor, forward: Any) -> PackedWeight | None:
    """The weight of ``module`` for the input ``x``; ``None`` where the fused ops cannot be used.

    Args:
        module: a layer of bitsandbytes.
        x: its input, in any dtype.
        forward: that of the original class, a bound method.
    """
    device = x.device.type
    if device not in fused_linear.DEVICES or not _is_the_librarys(forward.__func__):
        return None
    state = quantization_of(module)
    weight = _int8(module, x, forward) if state is None else _four_bits(module, state, x, forward)
    if weight is not None and any_autocast_enabled() and torch.is_autocast_enabled(device):
        return weight if torch.get_autocast_dtype(device) == weight.dtype else None
    return weight


@cache
def _is_the_librarys(forward: Any) -> bool:
    """Whether a forward is bitsandbytes' own, and so computes ``W0 x + b`` by the weight as it is stored."""
    module: str = forward.__module__
    return module.partition(".")[0] == QUANTIZING_LIBRARY


def _four_bits(module: Any, state: Any, x: Tensor, forward: Any) -> PackedWeight | None:
    if is_packed_for_cpu(state):
        return None
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    dtype = module.compute_dtype or x.dtype
    # Reading an attribute of a parameter of bitsandbytes runs Python code. Its plain alias counts the same writes.
    stored = module._parameters["weight"].detach()
    rows = x.numel() // x.shape[-1]
    by_codes = rows <= MAX_ROWS_BY_CODES and multiplies_by_codes(stored.get_device(), dtype, rows, *state.shape)
    product = forward if by_codes else None
    return PackedWeight(stored, dtype, partial(dequantize_4bit, FourBits.of(stored, state), dtype), product)


@cache
def multiplies_by_codes(device: int, dtype: torch.dtype, rows: int, out_features: int, in_features: int) -> bool:
    """Whether bitsandbytes may multiply these shapes by the codes, as it does for few rows.

    By the matrix the op takes the host less time than by calling bitsandbytes, which computes it too. Only bitsandbytes
    knows where it does; a version that does not say so is taken to multiply by the codes.
    """
    module, name = PRODUCT_BY_CODES
    decides = getattr(sys.modules.get(module), name, None)
    if decides is None or device < 0:
        return True
    try:
        return bool(decides(device, dtype, rows, out_features, in_features))
    except TypeError:  # other arguments than those of 0.50
        return True


def _int8(module: Any, x: Tensor, forward: Any) -> PackedWeight | None:
    codes, largest = int8_of(module)
    if codes is None or largest is None:
        return None
    matrix = partial(dequantized_int8, codes, largest, x.dtype)
    return PackedWeight(module._parameters["weight"].detach(), x.dtype, matrix, forward)
