"""Where the kernels serve, and what torch is asked about the moment."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lightning_lora.products import HALVES

SHARED_MEMORY = 200 * 1024  # bytes for a program: the GPUs on which the kernels were measured, Hopper, and later


def is_packing() -> bool:
    """Whether tensors that are kept for backward are packed now: by activation checkpointing, or offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def kernels_serve(tensor: Tensor) -> bool:
    """Whether the kernels serve for ``tensor``, which nobody differentiates twice."""
    return (
        tensor.is_cuda
        and tensor.dtype in HALVES
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and runs_kernels(tensor.get_device())
    )


@functools.cache
def runs_kernels(device: int) -> bool:
    """Whether a GPU is of the kind on which the kernels were measured, and Triton is there, as it is beside torch."""
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return memory >= SHARED_MEMORY and importlib.util.find_spec("triton") is not None
