"""Adapter state dicts load by a module's own ``load_state_dict``, whether its adapters are live or merged.

Many libraries restore the best checkpoint by ``module.load_state_dict(torch.load(path)["state_dict"])`` after ``fit``.
The file of a LoRA run holds no frozen parameter, and torch alone would refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora import names
from lightning_lora.model.merge import unmerged
from lightning_lora.model.record import is_merged, record_of
from lightning_lora.model.state import (
    check_state,
    clean_state,
    frozen_names,
    load_lora_state_dict,
    lora_parameters,
    own_state,
)
from lightning_lora.targets.survey import Survey, survey_of


class AdapterStateDict:
    """A ``load_state_dict`` pre-hook: it loads an adapter state dict, and gives torch the module's own tensors instead.

    Any other state dict is left to torch. torch does not tell a hook the argument ``strict``, so an adapter state dict
    must fit exactly under ``strict=False`` too.
    """

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        """If the entries of ``module`` in ``state_dict`` are those of an adapter, load all of them or none."""
        # Below the module that was adapted, only the one whose `load_state_dict` was called knows the whole file.
        if names.clean(prefix) and record_of(module).config is None:
            return
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        adapter = {names.clean(key[len(prefix) :]): value for key, value in entries.items()}
        if not is_adapter_state(module, adapter):
            return
        check_state(module, adapter)
        with unmerged(module):
            load_lora_state_dict(module, adapter)
        for key in entries:
            del state_dict[key]
        state_dict.update({prefix + key: value for key, value in own_state(module).items()})  # torch copies nothing


def is_adapter_state(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` has entries of adapters, of ``model`` or of another one, that torch cannot load by itself.

    Into a model with live adapters torch loads a state dict that also holds frozen parameters.
    """
    present, adapters = clean_state(model), {name for name, _ in lora_parameters(model)}
    named = (key for key in state if "lora" in key.split("."))
    if not any(key in adapters or key not in present for key in named):
        return False
    return is_merged(model) or not frozen_names(model) & state.keys()


def accept_adapters(model: nn.Module | Survey) -> None:
    """Let adapter state dicts load into ``model`` and into every part of it that holds an adapted layer.

    The hooks stay when the adapters are merged, and are removed with the records of their modules.
    """
    for module in survey_of(model).around_layers().values():
        record = record_of(module)
        if record.load_hook is None:
            record.load_hook = module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                AdapterStateDict()
            )
