"""What trains in addition to one of several adapters, and is frozen again when that adapter is taken off."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lightning_lora.distributed.sharded import local_shard
from lightning_lora.model.freeze import adapter_parameters, asked_in, trained_parameters
from lightning_lora.model.initial_values import check_writable
from lightning_lora.model.journal import Journal
from lightning_lora.model.record import holders, kept_names, records
from lightning_lora.names import join


def trained_by(model: nn.Module, name: str | None = None) -> set[int]:
    """The ``id`` of each parameter of the base that configurations on ``model`` and its parts ask to train.

    Args:
        model: an adapted model.
        name: only what the configuration of that adapter asks for; ``None`` for what any does.
    """
    return {
        parameter
        for holder, configs in holders(model)
        for config in configs
        if name in (None, config.name)
        for parameter in asked_in(holder, config)
    }


@torch.no_grad()
def release(model: nn.Module, parameters: Collection[int], journal: Journal) -> None:
    """Give ``parameters`` of the base their initial values back, and let them train no more.

    Args:
        model: the adapted model.
        parameters: by ``id``.
        journal: of the change.

    Raises:
        ValueError: if one of them is partitioned by ZeRO 3.
    """
    for name, module, record in records(model):
        for key in [key for key in record.trained if id(module._parameters.get(key)) in parameters]:
            parameter = module._parameters[key]
            if parameter is not None and key in record.originals:
                check_writable(join(name, key), parameter)
                journal.keep(parameter)
                local_shard(parameter).copy_(record.originals.pop(key))
            record.trained.discard(key)
            record.held.discard(key)


def warning_of_changes(model: nn.Module) -> str | None:
    """What to know where a run trains some of the base, and so changes what the kept adapters compute."""
    kept = ", ".join(f"`{name}`" for name in sorted(kept_names(model)))
    added = adapter_parameters(model).keys() if kept else ()
    changed = [name for name, parameter in trained_parameters(model) if id(parameter) not in added] if kept else []
    if not changed:
        return None
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return (
        f"`keep` has {kept}, and this run trains `{changed[0]}`{more} in addition, which act with every adapter: what "
        "the kept ones compute changes. To leave it as it is train adapters alone: also_train=None, bias='none'."
    )
