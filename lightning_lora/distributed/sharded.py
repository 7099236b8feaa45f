"""Parameters of which each rank holds a part: the part that is here, the whole, and the units that gather it.

FSDP2 keeps them as ``DTensor``, FSDP1 as pieces of one flat parameter for each unit, DeepSpeed's ZeRO 3 as empty
tensors with their part in an attribute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names


def _loaded(module: str, name: str) -> type[Any]:
    """A class of torch's where its module is loaded: without that nothing can be of it."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else type(None)


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def is_partitioned(tensor: object) -> bool:
    """Whether ``tensor`` is a parameter of ZeRO 3 that is not gathered now."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_split(tensor: object) -> bool:
    """Whether ``tensor`` is a parameter that FSDP1 or ZeRO 3 has taken to pieces, which no rank can write."""
    return hasattr(tensor, "ds_id") or bool(getattr(tensor, "_fsdp_flattened", False))


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, in the same memory and without a gradient."""
    if is_partitioned(tensor):
        return tensor.ds_tensor.detach()  # type: ignore[attr-defined, no-any-return]
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of ``tensor``; every rank must call it."""
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Iterable[Tensor], write: bool = False) -> AbstractContextManager[None]:
    """While it lasts, those of ``tensors`` that ZeRO 3 has partitioned are whole, to be read, or written alike."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        return nullcontext()
    zero = sys.modules["deepspeed"].zero
    return zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)  # type: ignore[no-any-return]


def shard_like(own: Tensor, value: Tensor) -> Tensor:
    """The whole ``value`` as ``own`` is laid out over the ranks, each of which has all of it already."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    part = value[shard_region(own)].to(own.device).contiguous()
    return DTensor.from_local(
        part,
        own.device_mesh,  # type: ignore[attr-defined]
        own.placements,  # type: ignore[attr-defined]
        shape=own.shape,
        stride=own.stride(),
    )


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of all of ``tensor``: partitioned by ZeRO 3, or packed into four bits, it has another of its own."""
    packed = getattr(getattr(tensor, "quant_state", None), "shape", None)
    partitioned = getattr(tensor, "ds_shape", None)
    return next(shape for shape in (partitioned, packed, tensor.shape) if shape is not None)


def shard_region(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole ``tensor`` the part of this rank lies."""
    if not is_sharded(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 unit in ``model`` keep its own part alone: after an evaluation the root still has the whole."""
    unit = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, unit):
            module.reshard()


def fsdp1_units(model: nn.Module) -> list[nn.Module]:
    """The FSDP1 units in ``model``."""
    unit = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    return [module for module in model.modules() if isinstance(module, unit)]


@torch.no_grad()
def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of ``model`` under its first clean name, gathered for as long as the loop stands at it.

    At no time is more than one FSDP1 unit, or one FSDP2 parameter, in memory. Every rank must go through all of it.
    """
    reshard(model)
    name_of = {id(parameter): name for name, parameter in names.named_parameters(model)}
    for unit in fsdp1_units(model):
        with unit.summon_full_params(unit, recurse=False, writeback=False):  # type: ignore[operator]
            yield from ((name_of.pop(id(p)), p.detach()) for p in _own_parameters(unit) if id(p) in name_of)
    for name, parameter in names.named_parameters(model):
        if id(parameter) in name_of:
            yield name, full_tensor(parameter).detach()


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters in ``unit`` that are in no unit inside it."""
    inside = {id(module) for inner in fsdp1_units(unit)[1:] for module in inner.modules()}
    for module in unit.modules():
        if id(module) not in inside:
            yield from module.parameters(recurse=False)


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale the gradients of ``parameters`` so that the norm of all, sharded or not, is at most ``limit``.

    ``torch.nn.utils.clip_grad_norm_`` takes either kind alone. Every rank must call it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = [[g for g in gradients if is_sharded(g) is kind] for kind in (False, True)]
    norms = [full_tensor(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    if norms:
        factor = (limit / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)  # as torch's
        for gradient in gradients:
            local_shard(gradient).mul_(factor.to(gradient.device))


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], limit: float) -> None:
    """Bring every element of their gradients between ``-limit`` and ``limit``."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_shard(parameter.grad).clamp_(-limit, limit)
