"""Parameters that are sharded over ranks: the local shard, the full tensor, and the units that gather it.

FSDP2 stores them as ``DTensor``, FSDP1 as views of one flat parameter per unit, and DeepSpeed's ZeRO 3 as empty tensors
with the shard in an attribute.
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
    """A class of torch if its module is already imported; otherwise no object can be an instance of it."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else type(None)


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def is_partitioned(tensor: object) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO 3 has partitioned and has not gathered now."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_split(tensor: object) -> bool:
    """Whether FSDP1 or ZeRO 3 manages ``tensor`` as a shard of a flat buffer, so that it cannot be written directly."""
    return hasattr(tensor, "ds_id") or bool(getattr(tensor, "_fsdp_flattened", False))


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of ``tensor`` on this rank: the same memory, detached from autograd."""
    if is_partitioned(tensor):
        return tensor.ds_tensor.detach()  # type: ignore[attr-defined, no-any-return]
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks; every rank must call this."""
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Iterable[Tensor], write: bool = False) -> AbstractContextManager[None]:
    """Context manager in which ZeRO 3 gathers the partitioned ones of ``tensors``.

    Args:
        tensors: any tensors; those that are not partitioned stay as they are.
        write: whether the values of rank 0 are scattered to all ranks at the end.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        return nullcontext()
    zero = sys.modules["deepspeed"].zero
    return zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)  # type: ignore[no-any-return]


def shard_like(reference: Tensor, value: Tensor) -> Tensor:
    """``value``, a full tensor that every rank has, sharded over the ranks as ``reference`` is."""
    if not is_sharded(reference) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    shard = value[shard_region(reference)].to(reference.device).contiguous()
    return DTensor.from_local(
        shard,
        reference.device_mesh,  # type: ignore[attr-defined]
        reference.placements,  # type: ignore[attr-defined]
        shape=reference.shape,
        stride=reference.stride(),
    )


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the full tensor: ``.shape`` differs if ZeRO 3 partitioned it or if it is packed into 4 bits."""
    packed = getattr(getattr(tensor, "quant_state", None), "shape", None)
    partitioned = getattr(tensor, "ds_shape", None)
    return next(shape for shape in (partitioned, packed, tensor.shape) if shape is not None)


def shard_region(tensor: Tensor) -> tuple[slice, ...]:
    """The slices of the full tensor that the shard of this rank covers."""
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
    """Free the gathered parameters of every FSDP2 unit in ``model``: after an evaluation the root still holds them."""
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
    """Iterate over every parameter of ``model`` as a full tensor, by its first clean name.

    A parameter is gathered only during its iteration: at most one FSDP1 unit, or one FSDP2 parameter, is in memory.
    Every rank must iterate to the end.
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
    """The parameters of ``unit`` that belong to no nested unit."""
    nested = {id(module) for inner in fsdp1_units(unit)[1:] for module in inner.modules()}
    for module in unit.modules():
        if id(module) not in nested:
            yield from module.parameters(recurse=False)


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale the gradients of ``parameters`` so that their total norm is at most ``limit``.

    ``torch.nn.utils.clip_grad_norm_`` accepts either sharded or plain gradients, not both. Every rank must call this.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    groups = [[gradient for gradient in gradients if is_sharded(gradient) is sharded] for sharded in (False, True)]
    norms = [full_tensor(nn.utils.get_total_norm(group)) for group in groups if group]
    if norms:
        factor = (limit / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)  # the formula of torch
        for gradient in gradients:
            local_shard(gradient).mul_(factor.to(gradient.device))


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], limit: float) -> None:
    """Clamp every element of the gradients of ``parameters`` to ``[-limit, limit]``."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_shard(parameter.grad).clamp_(-limit, limit)
