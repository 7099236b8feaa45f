"""The state dict of the merged model without a merge: sharded weights are gathered one by one and not kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_parameters
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.merge_layer import factors_of
from lightning_lora.names import join, named_modules, named_parameters
from lightning_lora.ops import exact_sum as exact


@torch.no_grad()
def merged_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the merged model, one tensor at a time; ``model`` is not changed.

    Every rank must iterate to the end.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append((join(name, key), module, key))
    of_name = {name: users[id(parameter)] for name, parameter in named_parameters(model)}
    for first, value in full_parameters(model):
        for name, module, key in of_name[first]:
            if not isinstance(module, Adapter):
                yield name, _sum(value, module.lora.by_weight().get(key, []) if isinstance(module, LoRALayer) else [])
    for name, module in named_modules(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield join(name, key), buffer


def _sum(value: Tensor, adapters: list[Adapter]) -> Tensor:
    if not adapters:
        return value
    pairs = zip(adapters[0].part.matrices(value), factors_of(adapters, value), strict=True)
    return torch.stack([exact.add_delta(matrix, factors).merged for matrix, factors in pairs]).view(value.shape)
