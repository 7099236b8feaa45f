"""Layers that the user's own hooks replace: what belongs to the old layers moves to the new ones.

Some modules build their head anew in every ``setup``, or in ``on_load_checkpoint``, and copy the old weights into it
(pyannote.audio does). Adapters and records are on the layers themselves, so they would be lost with the old layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_lora import names
from lightning_lora.distributed.sharded import is_sharded
from lightning_lora.methods.base import Method
from lightning_lora.model.freeze import is_frozen, unfreeze
from lightning_lora.model.record import Record, all_records, place_again
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.trainer.imports import rank_zero_warn


@dataclass(frozen=True)
class Layers:
    """The layers of a module before a hook of the user's runs.

    Args:
        modules: every module by clean name.
        records: the record of each module that has one.
        added: the parameters that the method added.
        live: whether the adapters act, so that a new layer needs one too.
    """

    modules: dict[str, nn.Module]
    records: dict[str, Record]
    added: dict[str, nn.Parameter]
    live: bool


def layers_of(module: nn.Module, method: Method) -> Layers:
    """What :func:`move_to_replaced` needs to know of ``module`` before the hook."""
    added = dict(method.added_parameters(module))
    return Layers(dict(names.named_modules(module)), all_records(module), added, method.is_adapted(module))


def move_to_replaced(
    before: Layers, module: nn.Module, method: Method, adapt: Callable[[], Any] | None = None
) -> set[str] | None:
    """Adapt the layers that a hook replaced, and move the adapters and records of the old layers to them.

    Only a layer with the same weights, bit for bit, takes over what the old one had. Any other layer is a new base, and
    its adapter starts anew.

    Args:
        before: from :func:`layers_of`, called before the hook.
        module: the module after it.
        method: what it is adapted by.
        adapt: adapts the new layers; ``None`` is ``method.complete``.

    Returns:
        The layers whose trained adapters were not moved; ``None`` if the hook replaced nothing.
    """
    now = dict(names.named_modules(module))
    replaced = {name for name, new in now.items() if before.modules.get(name) is not new}
    if not replaced:
        return None
    equal = {name for name in replaced & before.records.keys() if _same_weights(before.modules[name], now[name])}
    # A hook belongs to the module that it is registered on; the new module gets its own.
    place_again(module, {name: replace(before.records[name], load_hook=None) for name in equal})
    if before.live:
        _adapt_again(module, adapt or (lambda: method.complete(module)))
    return _move_values(before, module, method, equal)


def _same_weights(old: nn.Module, new: nn.Module) -> bool:
    pairs = [(old._parameters.get(key), new._parameters.get(key)) for key in {**old._parameters, **new._parameters}]
    return all(_same_parameter(first, second) for first, second in pairs)


def _same_parameter(old: nn.Parameter | None, new: nn.Parameter | None) -> bool:
    if old is None or new is None or old is new:
        return old is new
    if old.is_meta or new.is_meta:  # without values
        return old.is_meta and new.is_meta and old.shape == new.shape
    return not is_sharded(new) and not is_sharded(old) and same_bits(old, new)


def _adapt_again(module: nn.Module, adapt: Callable[[], Any]) -> None:
    was_frozen = is_frozen(module)
    adapt()
    if not was_frozen:  # after a run
        unfreeze(module)


@torch.no_grad()
def _move_values(before: Layers, module: nn.Module, method: Method, equal: set[str]) -> set[str]:
    added, lost = dict(method.added_parameters(module)), []
    for name, old in before.added.items():
        new, site = added.get(name), name.partition(f".{method.key}.")[0]
        if new is old or (new is not None and (is_sharded(new) or new.is_meta or same_bits(old, new))):
            continue
        if new is not None and site in equal and old.shape == new.shape:
            new.copy_(old)
        else:
            lost.append(site)
    return set(lost)


def warn_of_lost(lost: set[str], module: nn.Module) -> None:
    """Warn that trained adapters were not moved, where no file gives them their values."""
    if lost:
        rank_zero_warn(
            f"`{min(lost)}` was replaced by a layer with other weights, by a hook of {type(module).__name__}: its "
            "adapter was trained on the old weights, and starts anew. To continue it copy the weights into the new "
            "layer, or build the layer once."
        )


def run_hook(module: Any, hook: str, method: Method, *args: Any) -> None:
    """Call the ``hook`` of ``module``, and see to the layers that it replaces."""
    before = layers_of(module, method)
    getattr(module, hook)(*args)
    move_to_replaced(before, module, method)
