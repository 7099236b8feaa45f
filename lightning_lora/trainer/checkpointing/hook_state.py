"""The state dict that the user's checkpoint hooks see: of the whole module, though a file holds adapters alone.

A hook may read, pop or fill in any entry of the module. Around a hook the checkpoint gets references to the module's
own tensors; nothing is copied or gathered. Where a strategy shards the module there are only the entries of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.methods.base import Method
from lightning_lora.model.state import full_detached, own_state
from lightning_lora.names import clean
from lightning_lora.trainer.checkpointing.contents import tensor_ids


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Every entry of ``module``, adapters included, under its present keys: its own memory, detached."""
    return {key: full_detached(value) for key, value in own_state(module).items()}


def fill_in(checkpoint: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Add the entries of ``module`` that the state dict in ``checkpoint`` lacks, in the order of the module.

    Returns:
        The entries that were added.
    """
    own, state = whole_state(module), checkpoint["state_dict"]
    checkpoint["state_dict"] = {**{key: state.get(key, value) for key, value in own.items()}, **state}
    return {key: value for key, value in own.items() if key not in state}


def trained_entries(
    checkpoint: Mapping[str, Any], filled_in: Mapping[str, Any], method: Method, module: nn.Module
) -> dict[str, Any]:
    """The state dict in ``checkpoint`` under clean names, without the base and without what was ``filled_in``.

    Hooks may rename entries, so what was filled in is known by its objects.
    """
    frozen, own = method.frozen_names(module), tensor_ids(filled_in.values())
    return {
        clean(key): value
        for key, value in checkpoint["state_dict"].items()
        if clean(key) not in frozen and id(value) not in own
    }
