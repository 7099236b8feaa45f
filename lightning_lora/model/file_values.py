"""Checks of values from files, before any of them is copied into a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.distributed.sharded import is_sharded, is_split, shape_of
from lightning_lora.files.json_files import shown
from lightning_lora.ops.exact_sum import same_bits


def check_value(key: str, value: Tensor, own: Tensor) -> None:
    """Raise unless ``value`` can be copied into ``own``: a plain dense tensor of its shape, real where it is real.

    Args:
        key: name of both.
        value: from a file.
        own: of the model; of a sharded one the full shape counts.

    Raises:
        ValueError: saying what differs.
    """
    if tuple(value.shape) != tuple(shape_of(own)):
        raise ValueError(
            f"{shown(key)} has shape {tuple(value.shape)} in the file and {tuple(shape_of(own))} in the model."
        )
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        raise ValueError(f"{shown(key)} is a sparse, quantized or empty tensor in the file, and must be a plain one.")
    both_real = value.is_floating_point() and own.is_floating_point()
    if not both_real and value.dtype != own.dtype:
        raise ValueError(f"{shown(key)} is of {value.dtype} in the file and of {own.dtype} in the model.")


def check_finite(key: str, value: Tensor, own: Tensor) -> None:
    """Raise if ``value`` holds NaN or infinity, or a number that the dtype of ``own`` has no room for.

    Raises:
        ValueError: saying which of the two.
    """
    if not value.is_floating_point() or bool(value.to(own.dtype).isfinite().all()):
        return
    if bool(value.isfinite().all()):
        raise ValueError(f"{shown(key)} has values that the model's {own.dtype} has no room for.")
    raise ValueError(f"{shown(key)} holds NaN or infinity: the training that wrote it diverged.")


def is_whole(value: Any) -> bool:
    """Whether the values of ``value`` are all on this rank."""
    return not (isinstance(value, Tensor) and (value.is_meta or is_sharded(value) or is_split(value)))


def agree(stored: Any, own: Any) -> bool:
    """Whether two values are equal but for rounding to the dtype of one of them, as far as they can be compared."""
    if not isinstance(stored, Tensor) or not isinstance(own, Tensor) or not is_whole(own):
        return True
    if stored.shape != own.shape or same_bits(stored, own):
        return stored.shape == own.shape
    if not (stored.is_floating_point() and own.is_floating_point()):
        return False
    step = 4 * max(torch.finfo(value.dtype).eps for value in (stored, own))
    actual, expected = (value.detach().to("cpu", torch.float64) for value in (stored, own))
    size = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(actual, expected, rtol=step, atol=step * size, equal_nan=True)
