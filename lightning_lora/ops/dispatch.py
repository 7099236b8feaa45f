"""When the Triton kernels can be used, and guards around a backward that is written by hand."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.products import HALF_DTYPES
from lightning_lora.torch_internals import any_autocast_enabled, is_batched, version_of

# The kernels were measured on Hopper GPUs with ranks of at most 32.
MIN_SHARED_MEMORY = 200 * 1024  # bytes per program
MAX_R = 32
DEVICES = ("cuda",)  # on which launching the kernels of a small layer takes longer than they run

Backward = Callable[..., Any]


def without_autocast(backward: Backward) -> Backward:
    """Decorator that turns autocast off, as ``backward`` called inside an autocast region must use forward's dtypes."""

    @functools.wraps(backward)
    def plain(ctx: Any, *gradients: Tensor | None) -> Any:
        if not any_autocast_enabled():
            return backward(ctx, *gradients)
        device = next((gradient.device.type for gradient in gradients if gradient is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return plain


def check_unmodified(tensor: Tensor, version: int) -> Tensor:
    """Return ``tensor``, which backward needs as it was in forward.

    Raises:
        RuntimeError: if it was modified in place since, as torch raises for tensors that it saved itself.
    """
    if tensor._version != version if version >= 0 else not tensor.is_inference():
        raise RuntimeError(
            "A, B or W0 of a LoRA layer, needed for gradient computation, has been modified by an inplace operation: "
            f"it is at version {version_of(tensor)}; expected version {version}. Call backward before a step."
        )
    return tensor


def can_use_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels can compute on ``tensor``: a half dtype, a measured GPU, and no second derivative."""
    return (
        tensor.is_cuda
        and tensor.dtype in HALF_DTYPES
        and not torch.is_grad_enabled()
        and not is_batched(tensor)
        and supports_kernels(tensor.get_device())
    )


@functools.cache
def supports_kernels(device: int) -> bool:
    """Whether GPU ``device`` is of the kind that the kernels were measured on, and Triton is installed."""
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return memory >= MIN_SHARED_MEMORY and importlib.util.find_spec("triton") is not None
