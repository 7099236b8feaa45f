"""Where the kernels serve, and what torch is asked about the moment."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.products import HALVES
from lightning_lora.torch_internals import in_functorch_transform, version_of

SHARED_MEMORY = 200 * 1024  # bytes for a program: the GPUs on which the kernels were measured, Hopper, and later
LARGEST_R = 32  # with which they were

Backward = Callable[..., Any]


def outside_autocast(backward: Backward) -> Backward:
    """``backward`` as it was written: called inside an autocast region, it would have other dtypes than its forward."""

    @functools.wraps(backward)
    def plain(ctx: Any, *gradients: Tensor | None) -> Any:
        device = next((gradient.device.type for gradient in gradients if gradient is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return plain


def as_it_was(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, which is differentiated through now, as it was in forward.

    Raises:
        RuntimeError: if it was written to since, as torch has it of what it keeps for backward.
    """
    if version_of(tensor) != version:
        raise RuntimeError(
            "A or B of an adapter, needed for gradient computation, has been modified by an inplace operation: it is "
            f"at version {version_of(tensor)}; expected version {version}. Differentiate twice before a step."
        )
    return tensor


def kernels_serve(tensor: Tensor) -> bool:
    """Whether the kernels serve for ``tensor``, which nobody differentiates twice."""
    return (
        tensor.is_cuda
        and tensor.dtype in HALVES
        and not torch.is_grad_enabled()
        and not in_functorch_transform()
        and runs_kernels(tensor.get_device())
    )


@functools.cache
def runs_kernels(device: int) -> bool:
    """Whether a GPU is of the kind on which the kernels were measured, and Triton is there, as it is beside torch."""
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return memory >= SHARED_MEMORY and importlib.util.find_spec("triton") is not None
