"""The fingerprint of a base: checksums of every frozen parameter, two of which are the same after a cast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import full_parameters, shape_of
from lightning_lora.files.json_files import printable, shown
from lightning_lora.layers.quantized.formats import codes_in
from lightning_lora.model.copies import copied_names
from lightning_lora.model.freeze import in_files
from lightning_lora.model.state import added_parameters
from lightning_lora.model.written import renormalized, written_parameters
from lightning_lora.ops.exact_sum import checksum, same_bits
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor

Fingerprint = dict[str, list[int | None]]
HALF = (torch.bfloat16, torch.float16)  # in the order of the first two checksums of an entry


def fingerprint(model: nn.Module, device: torch.device | str | None = None) -> Fingerprint:
    """For each frozen parameter: its checksums after rounding to bf16 and to fp16, its exact one, and its shape.

    The same base loaded in fp32 and in bf16 agrees in the first, loaded in fp32 and in fp16 in the second. Of a
    quantized parameter only the shape of its matrix counts, as its library may pack the values anew; the shape alone
    counts as well for what changes during training: other code writes it, or it is an embedding with ``max_norm``.
    Copies that a hook made after injection are left out. Every rank must call it: sharded parameters are gathered one
    by one.

    Args:
        model: any module, with live or merged adapters or without.
        device: where to compute, one parameter at a time; a CPU takes half a minute for 7 B parameters.
    """
    left_out = {name for name, _ in (*in_files(model), *added_parameters(model))} | copied_names(model)
    codes = codes_in(model)
    quantized = {
        name: [None, None, None, *codes.get(id(p), shape_of(p))]
        for name, p in names.named_parameters(model)
        if hasattr(p, "quant_state") or id(p) in codes
    }
    changing = {id(parameter) for _, parameter in written_parameters(model)} | renormalized(model)
    uncompared = {name for name, parameter in names.named_parameters(model) if id(parameter) in changing}
    values = ((name, value) for name, value in full_parameters(model) if name not in left_out)
    return {
        name: quantized.get(name) or (shape_alone(value) if name in uncompared else sums_of(value, device))
        for name, value in values
    }


def shape_alone(tensor: Tensor) -> list[int | None]:
    """The entry of a parameter whose values are not compared."""
    return [None, None, None, *shape_of(tensor)]


def sums_of(tensor: Tensor, device: torch.device | str | None = None) -> list[int | None]:
    """The entry of :func:`fingerprint` for one parameter."""
    if tensor.is_meta or not tensor.is_floating_point() or is_quantized_tensor(tensor):
        return shape_alone(tensor)
    tensor = tensor if device is None else tensor.to(device)
    sums = {dtype: checksum(tensor.to(dtype)) for dtype in HALF}
    exact = sums[tensor.dtype] if tensor.dtype in sums else checksum(tensor)
    return [sums[torch.bfloat16], sums[torch.float16], exact, *tensor.shape]


@torch.no_grad()
def has_values(tensor: Tensor, sums: Sequence[int | None]) -> bool:
    """Whether ``tensor`` has the values that an entry of a fingerprint was taken of, or a cast of them."""
    if tensor.is_meta or sums[2] is None:
        return True
    if is_quantized_tensor(tensor):  # since the entry was taken
        return False
    if tensor.dtype in HALF:
        return checksum(tensor) == sums[tensor.dtype == torch.float16]
    if checksum(tensor) == sums[2] or (tensor.dtype == torch.float64 and checksum(tensor.float()) == sums[2]):
        return True
    return tensor.is_floating_point() and any(
        _was_widened(tensor, dtype, rounded, sums[2]) for dtype, rounded in zip(HALF, sums[:2], strict=True)
    )


def _was_widened(tensor: Tensor, dtype: torch.dtype, rounded: int | None, exact: int | None) -> bool:
    """Whether ``tensor`` is a cast of one in the half-precision ``dtype``, the entry of which has these checksums."""
    if rounded != exact:  # it had another dtype
        return False
    half = tensor.to(dtype)
    return checksum(half) == rounded and same_bits(half.to(tensor.dtype), tensor)


def is_fingerprint(value: object) -> bool:
    """Whether ``value`` from a file has the form of a fingerprint."""
    return isinstance(value, dict) and all(isinstance(name, str) and _is_entry(entry) for name, entry in value.items())


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 3
        and all(number is None or type(number) is int for number in value[:3])
        and all(type(size) is int for size in value[3:])
    )


def other_base(expected: Fingerprint, present: Fingerprint) -> str | None:
    """The first difference between two bases, a file's and a model's; ``None`` where they are equal but for a cast."""
    return next(differences(expected, present), None)


def differences(expected: Fingerprint, present: Fingerprint) -> Iterator[str]:
    """Every difference between two bases but that of a cast, one for each parameter."""
    for name in dict.fromkeys((*expected, *present)):
        if name not in present or name not in expected:
            yield f"{shown(name)} is only in {'the file' if name in expected else 'the model'}"
            continue
        (*rounded, _), shape = expected[name][:3], expected[name][3:]
        (*rounded_here, _), shape_here = present[name][:3], present[name][3:]
        if (
            shape != shape_here
            and not _is_packed(expected[name], shape_here)
            and not _is_transposed(expected[name], shape_here)
        ):
            yield f"`{name}` had shape {printable(str(tuple(shape)))} and has {tuple(shape_here)} here"
            continue
        comparable = None not in (*rounded, *rounded_here)
        if comparable and not any(a == b for a, b in zip(rounded, rounded_here, strict=True)):
            yield f"`{name}` has other values"


def _is_transposed(entry: list[int | None], shape: list[int | None]) -> bool:
    """Whether ``entry`` is of a quantized matrix of ``shape``, transposed: the codes of a ``Conv1D`` are stored so."""
    return entry[:3] == [None, None, None] and entry[3:] == shape[::-1]


def _is_packed(entry: list[int | None], shape: list[int | None]) -> bool:
    """Whether ``entry`` has the shape in which bytes of two 4-bit numbers are stored, as version 0.1.0 recorded it."""
    count = math.prod(size or 0 for size in entry[3:])
    return entry[:3] == [None, None, None] and 2 * count == math.prod(size or 0 for size in shape)


def inexact(expected: Fingerprint, present: Fingerprint, adapter: str) -> str | None:
    """A warning about two bases between which :func:`other_base` knows no difference; ``None`` if they are one.

    Args:
        expected: of the base on which ``adapter`` was trained.
        present: of the model that gets it.
        adapter: what the warning calls it.
    """
    names = [name for name in expected if (expected[name][2] is None) != (present[name][2] is None)]
    if names:
        which = f"`{names[0]}` and {len(names) - 1} more were" if len(names) > 1 else f"`{names[0]}` was"
        return (
            f"The base may not be the one that {adapter} was trained on: {which} compared by name and shape alone, "
            "being quantized in one of the two."
        )
    if exactly_same(expected, present):
        return None
    return f"The base differs in low bits from the one that {adapter} was trained on (another dtype?)."


def exactly_same(expected: Fingerprint, present: Fingerprint) -> bool:
    """Whether two bases are bit-identical, but for the biases of quantized layers: the first call casts them."""
    differing = [name for name in {**expected, **present} if expected.get(name) != present.get(name)]
    return all(name.endswith("bias") and _is_of_codes(name, expected) and name in present for name in differing)


def _is_of_codes(bias: str, base: Fingerprint) -> bool:
    """Whether ``bias`` is that of a quantized layer."""
    weight = base.get(f"{bias.removesuffix('bias')}weight")
    return weight is not None and weight[2] is None
