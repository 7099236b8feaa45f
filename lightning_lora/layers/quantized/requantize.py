"""What quantizing a matrix as a layer's weight was quantized would give.

It tells whether a matrix in full precision is the one that the layer was made of. The library is taken from the modules
that are loaded: a layer of it is there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.foreign import QUANTIZING_LIBRARY
from lightning_lora.layers.quantized.formats import INT8_MAX, int8_of, is_quantized_class, quantization_of

# The largest relative distance of two quantized weights, of which one was quantized from a bf16 copy of the matrix.
# Measured on normal numbers: 2.3 % for NF4, 2.5 % for FP4, .65 % for int8. Noise of .6 % of a weight's size gives more.
LIMIT_4BIT, LIMIT_INT8 = 0.04, 0.01
LIMIT_OTHER = 0.2  # of a format that this file does not know: the distance to the matrix itself


@torch.no_grad()
def quantized_again(layer: nn.Module, matrix: Tensor) -> Tensor:
    """``matrix`` quantized as the weight of ``layer`` is, and dequantized.

    Args:
        layer: a quantized layer. Where its weight is not quantized yet, or in a format that is not known, ``matrix``
            itself is returned.
        matrix: ``(out_features, in_features)``.
    """
    state, (codes, _) = quantization_of(layer), int8_of(layer)
    if state is not None:
        functional: Any = sys.modules[QUANTIZING_LIBRARY].functional
        packed = functional.quantize_4bit(
            matrix.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
        )
        result: Tensor = functional.dequantize_4bit(*packed)
        return result
    if codes is not None:
        functional = sys.modules[QUANTIZING_LIBRARY].functional
        codes_again, largest, _ = functional.int8_vectorwise_quant(matrix.half().contiguous())
        matrix = codes_again.float() * largest.float().unsqueeze(1) / INT8_MAX
    return matrix


def limit_of(layer: nn.Module) -> float:
    """How far :func:`quantized_again` may be from the layer's own matrix, relative to that, for the same base."""
    if quantization_of(layer) is not None:
        return LIMIT_4BIT
    return LIMIT_INT8 if is_quantized_class(type(layer)) else LIMIT_OTHER
