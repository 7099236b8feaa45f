"""Weights that bitsandbytes quantized, in the files of a model: which they are, and their numbers.

A 4-bit ``X.weight`` holds codes. The rest of it is in tensors of longer names, such as ``X.weight.absmax``; the one
that ends in ``bitsandbytes__nf4`` or ``bitsandbytes__fp4`` holds the bytes of a JSON object. An 8-bit weight has its
scales in ``X.SCB``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.files.json_files import parse_object, shown
from lightning_lora.files.safetensors import FLOATS, StoredTensor
from lightning_lora.files.weights import Weights
from lightning_lora.layers.quantized.formats import dequantized_int8
from lightning_lora.ops.packed.four_bits import FourBits, Nested, rows_by_torch

STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES)
SCALES, FORMAT = "SCB", "weight_format"  # of an 8-bit layer
LONGEST_STATE = 10_000  # bytes of JSON; bitsandbytes writes less than 300
Rows = Callable[[slice], Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight in files.

    Args:
        name: of the tensor with the codes.
        parts: names of the other tensors that belong to it.
        shape: of the matrix, ``(out_features, in_features)``.
        load: reads it, and returns a function that computes some rows of the matrix in fp32.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, int]
    load: Callable[[], Rows]


def is_quantized_in(name: str, base: Weights) -> bool:
    """Whether the tensor ``name`` of ``base`` holds the codes of a weight that bitsandbytes quantized."""
    return _is_4bit(name, base) or _is_8bit(name, base)


def _is_4bit(name: str, base: Weights) -> bool:
    return any(name + state in base.tensors for state in STATES)


def _is_8bit(name: str, base: Weights) -> bool:
    layer, _, key = name.rpartition(".")
    return key == "weight" and base.tensors[name].dtype == "I8" and f"{layer}.{SCALES}" in base.tensors


def quantized_weights(base: Weights, dtype: torch.dtype) -> list[QuantizedWeight]:
    """Every weight of ``base`` that bitsandbytes quantized.

    Args:
        base: a model in files.
        dtype: in which 4-bit layers compute: their numbers are rounded to it, as in the layers.

    Raises:
        ValueError: naming the first weight whose parts do not fit each other.
    """
    weights = []
    for name in base.tensors:
        if is_quantized_in(name, base):
            try:
                weights.append(_four_bits(name, base, dtype) if _is_4bit(name, base) else _eight_bits(name, base))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"`{name}` of `{base.path}` is quantized, and its parts do not fit each other "
                    f"({shown(str(error))}). Copy or download the files again."
                ) from error
    return weights


def _four_bits(name: str, base: Weights, dtype: torch.dtype) -> QuantizedWeight:
    parts = {part: base.tensors[name + part] for part in PARTS if name + part in base.tensors}
    state = _state(parts)
    rows, columns = state["shape"]
    _check_sizes(base.tensors[name], parts, state, rows * columns)

    def load() -> Rows:
        weight = _read(base.tensors[name], parts, state)
        return lambda rows: rows_by_torch(weight, rows).to(dtype).float()

    return QuantizedWeight(name, tuple(name + part for part in parts), (rows, columns), load)


def _state(parts: dict[str, StoredTensor]) -> dict[str, Any]:
    """The JSON object in the parts, once its numbers are checked."""
    stored = next(parts[state] for state in STATES if state in parts)
    if stored.nbytes > LONGEST_STATE:
        raise ValueError(f"its description has {stored.nbytes:,} bytes")
    state = parse_object(bytes(stored.read().tolist()))
    sizes = [*state["shape"], state["blocksize"]]
    if ".nested_absmax" in parts:
        sizes.append(state["nested_blocksize"])
        state["nested_offset"] = float(state["nested_offset"])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes must be positive integers, but are {sizes}")
    return state


def _check_sizes(codes: StoredTensor, parts: dict[str, StoredTensor], state: dict[str, Any], count: int) -> None:
    """Raise unless each part has as many numbers as ``count`` numbers of the matrix need."""
    blocks = math.ceil(count / state["blocksize"])
    needed = {".absmax": blocks, ".quant_map": 16}
    if ".nested_absmax" in parts:
        needed |= {".nested_absmax": math.ceil(blocks / state["nested_blocksize"]), ".nested_quant_map": 256}
    for part, size in needed.items():
        kinds = ("U8",) if part == ".absmax" and ".nested_absmax" in parts else FLOATS
        if parts[part].numel() != size or parts[part].dtype not in kinds:
            raise ValueError(f"{part} has {parts[part].numel()} numbers of {parts[part].dtype}, and needs {size}")
    if codes.nbytes != math.ceil(count / 2):
        raise ValueError(f"there are {codes.nbytes} bytes of codes for {count} numbers")


def _read(codes: StoredTensor, parts: dict[str, StoredTensor], state: dict[str, Any]) -> FourBits:
    values = {part: tensor.read().view(-1) for part, tensor in parts.items() if part not in STATES}
    nested = None
    if ".nested_absmax" in parts:
        offset = torch.tensor(state["nested_offset"])
        nested = Nested(
            values[".nested_absmax"].float(), values[".nested_quant_map"].float(), offset, state["nested_blocksize"]
        )
    table = values[".quant_map"].float()
    stored = codes.read().view(-1).view(torch.uint8)
    return FourBits(stored, values[".absmax"], table, "", state["blocksize"], tuple(state["shape"]), nested)


def _eight_bits(name: str, base: Weights) -> QuantizedWeight:
    layer = name.rpartition(".")[0]
    codes, scales, kind = (base.tensors.get(key) for key in (name, f"{layer}.{SCALES}", f"{layer}.{FORMAT}"))
    assert codes is not None and scales is not None
    if kind is not None and int(kind.read()) != 0:
        raise ValueError("the codes are in an order of early releases of bitsandbytes, for one kind of GPU")
    rows, columns = codes.shape
    if scales.shape != (rows,) or scales.dtype not in FLOATS:
        raise ValueError(f"{SCALES} has shape {scales.shape} and {scales.dtype} for {rows} rows")

    def load() -> Rows:
        numbers, largest = codes.read(), scales.read().float()
        return lambda rows: dequantized_int8(numbers[rows], largest[rows], torch.float32)

    parts = tuple(part.name for part in (scales, kind) if part is not None)
    return QuantizedWeight(name, parts, (rows, columns), load)
