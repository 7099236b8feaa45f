"""What of the base moves though the base is frozen: trained biases and modules, and buffers such as statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import local_shard
from lightning_lora.model.record import record_of, records
from lightning_lora.ops.exact_sum import same_bits


def remember(model: nn.Module) -> None:
    """Keep a copy, on the CPU, of everything that may move, as it is now; what was kept before stays as it was.

    Of what is sharded each rank keeps its own part.
    """
    for _, module in names.named_modules(model):
        record = record_of(module)
        for key, tensor in _own(module).items():
            may_move = key in record.trained or key in module._buffers
            if may_move and not tensor.is_meta and key not in record.originals:
                record.originals[key] = local_shard(tensor).to("cpu", copy=True)


def moved(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every tensor of the base that differs from what was remembered, a cast aside, with that value."""
    seen: set[int] = set()
    for _, module, record in records(model):
        own = _own(module)
        for key, original in record.originals.items():
            if key not in own or id(own[key]) in seen:
                continue
            seen.add(id(own[key]))
            if not same_bits(local_shard(own[key]), original.to(own[key].dtype)):
                yield module, key, original


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """Give the base its own values back."""
    for module, key, original in list(moved(model)):
        local_shard(_own(module)[key]).copy_(original)


def _own(module: nn.Module) -> dict[str, Tensor]:
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}
