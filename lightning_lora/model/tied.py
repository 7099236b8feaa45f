"""Which parameters several modules have: tied heads, and layers whose memory is one."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.distributed.sharded import local_shard


def parameter_holders(model: nn.Module) -> Counter[tuple[int, bool]]:
    """How many modules have each parameter, as an object or as memory."""
    owners = {id(module): module for module in model.modules()}
    return Counter(memory_of(module, key) for module in owners.values() for key in module._parameters)


def memory_of(module: nn.Module, key: str) -> tuple[int, bool]:
    """What two parameters have in common only if one is the other, as an object or as memory."""
    parameter = module._parameters[key]
    if parameter is None or parameter.is_meta or is_lazy(parameter) or not local_shard(parameter).data_ptr():
        return (id(parameter), False)
    return (local_shard(parameter).data_ptr(), True)
