"""How quantized weights are stored, and how they are dequantized.

bitsandbytes keeps a 4-bit weight as codes, two in a byte, and the largest absolute value of each block of numbers. That
value may be quantized again ("double quantization"): 8-bit codes, and an offset. Its 8-bit weight is a matrix of
``int8`` and the largest absolute value of each row. Both are in memory only once a layer was moved to a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.foreign import QUANTIZING_LIBRARIES, is_from
from lightning_lora.names import clean, each_module_once
from lightning_lora.ops.packed.four_bits import FourBits, dequantize_4bit
from lightning_lora.ops.packed.quantized_tensors import dequantized_tensor, is_quantized_tensor

INT8_MAX = 127
ROWS_ON_CPU = 32  # that bitsandbytes stores together where it packs a weight again for evaluation on a CPU


def is_quantized_class(cls: type[nn.Module]) -> bool:
    """Whether layers of class ``cls`` store a quantized weight, which is not a plain matrix."""
    return is_from(cls, *QUANTIZING_LIBRARIES) and issubclass(cls, nn.Linear)  # its embeddings are plain


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer with a quantized weight."""
    return is_quantized_class(type(module)) or is_quantized_tensor(module._parameters.get("weight"))


def quantized_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer of ``model`` with a quantized weight, each once, under its first clean name."""
    return [(clean(name), module) for name, module in each_module_once(model) if is_quantized(module)]


def stores_codes(module: nn.Module, key: str = "weight") -> bool:
    """Whether the parameter ``key`` of ``module`` holds the codes of a quantized weight, which take no gradient.

    So it does as well before the layer was moved to a device, where its numbers become codes. An 8-bit layer that keeps
    fp16 numbers, as of the plug-in's mode ``"int8-training"``, holds those.
    """
    keeps_numbers = getattr(getattr(module, "state", None), "has_fp16_weights", False)
    has_codes = key == "weight" and is_quantized(module) and not keeps_numbers
    return has_codes or is_quantized_tensor(module._parameters.get(key))


def codes_in(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """The parameters of ``model`` that hold codes, by ``id``, with the shapes of the matrices that they store."""
    return {id(m._parameters["weight"]): matrix_shape(m) for m in model.modules() if stores_codes(m)}


def holds_float_codes(parameter: Tensor) -> bool:
    """Whether ``parameter`` holds the codes of a quantized weight, and is taken for numbers of floating point."""
    storage = getattr(parameter, "quant_storage", None)
    return is_quantized_tensor(parameter) or (storage is not None and storage.is_floating_point)


def is_8bit(module: nn.Module) -> bool:
    """Whether ``module`` is an 8-bit layer of bitsandbytes, whose codes move from the weight to a state of its own."""
    return is_quantized_class(type(module)) and hasattr(module, "state")


def matrix_shape(module: Any) -> tuple[int, ...]:
    """The shape of the matrix, or of the convolution's kernel, that the weight of a quantized ``module`` stores."""
    weight = module._parameters["weight"]
    if is_quantized_tensor(weight):  # of an embedding or a convolution too, which have no such attributes
        return tuple(weight.shape)
    return module.out_features, module.in_features


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The dequantized weight of ``module``.

    Returns:
        ``(out_features, in_features)`` in new memory, in the dtype in which the layer computes, or fp32 where it has
        none.
    """
    weight: Any = module._parameters["weight"]
    if is_quantized_tensor(weight):
        return dequantized_tensor(weight)
    state = quantization_of(module)
    if state is not None:
        return dequantized_4bit(weight.data, state, getattr(module, "compute_dtype", None) or torch.float32)
    codes, largest = int8_of(module)
    if codes is None or largest is None:
        matrix: Tensor = weight.detach().to(torch.float32, copy=True)
        return matrix
    return dequantized_int8(codes, largest, torch.float32)


def quantization_of(module: nn.Module) -> Any:
    """What bitsandbytes knows of a 4-bit weight in addition to its codes; ``None`` where there is no such weight."""
    state = getattr(module._parameters["weight"], "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state  # FSDP takes it off the parameter


def is_packed_for_cpu(state: Any) -> bool:
    """Whether bitsandbytes packed the codes again, in another order, for evaluation on a CPU."""
    return vars(state).get("packing_format_for_cpu", False) is True  # a missing attribute is looked for at length


def int8_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The codes of an 8-bit weight, and the largest absolute value of each row; ``None`` where there is none.

    They are attributes of the parameter until the first forward, and of the layer's state after it.
    """
    state: Any = getattr(module, "state", None)
    if state is None or state.has_fp16_weights:
        return None, None
    owner = module._parameters["weight"] if state.CB is None else state
    return getattr(owner, "CB", None), getattr(owner, "SCB", None)


def dequantized_4bit(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The matrix of a 4-bit weight.

    Args:
        codes: two in a byte, of the shape in which bitsandbytes stores them.
        state: bitsandbytes' ``QuantState``.
        dtype: of the result; each number is computed in fp32 and rounded once.
    """
    if is_packed_for_cpu(state):
        return _dequantized_for_cpu(codes, state).to(dtype)
    return dequantize_4bit(FourBits.of(codes, state), dtype)


def dequantized_int8(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of an 8-bit weight, whose numbers are computed in fp32 and rounded once to ``dtype``.

    Args:
        codes: ``(out_features, in_features)``, int8.
        largest: the largest absolute value of each row, ``(out_features,)``.
        dtype: of the result.
    """
    matrix = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, largest.unsqueeze(1).mul(1 / INT8_MAX), out=matrix)  # one kernel


def codes_packed_for_cpu(codes: Tensor, state: Any) -> Tensor:
    """The codes of a weight that was packed again for evaluation on a CPU, one in a byte, in the order of the matrix.

    Of 32 rows and two columns, 64 codes, the low halves of 32 bytes hold the first 32, the high halves the others.
    """
    rows, columns = state.shape
    blocks = codes.view(torch.uint8).view(-1, ROWS_ON_CPU)
    halves = torch.cat([blocks & 0xF, blocks >> 4], dim=-1)
    return halves.view(-1, columns // 2, ROWS_ON_CPU, 2).transpose(1, 2).reshape(rows, columns)


def _dequantized_for_cpu(codes: Tensor, state: Any) -> Tensor:
    """The matrix in fp32 of a weight that was packed again for evaluation on a CPU."""
    matrix: Tensor = state.code.float()[codes_packed_for_cpu(codes, state).int()]
    return matrix.mul_(state.absmax.t().float().repeat_interleave(state.blocksize, dim=1))
