"""The state dict of adapters into a model that has them: all of it, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import (
    fsdp1_units,
    full_tensor,
    gathered,
    is_partitioned,
    local_shard,
    reshard,
    shape_of,
    shard_like,
)
from lightning_lora.files.json_files import shown
from lightning_lora.layers.base import is_adapted
from lightning_lora.model.file_values import check_finite, check_value
from lightning_lora.model.initial_values import moved
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.record import is_merged
from lightning_lora.model.state import (
    buffer_names,
    clean_state,
    frozen_names,
    lora_state_dict,
    merged_state,
    needed_names,
    save_own,
)


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any], name: str | None = None) -> None:
    """Load the result of :func:`lora_state_dict` into a model with the same adapters: all of it, or nothing.

    Buffers that are not in ``state`` had not changed when it was made: they get their initial values back.

    Args:
        model: a model with live adapters.
        state: of all its adapters; with ``name``, of that one at least.
        name: load only A and B of the adapter of that name; everything else in ``model`` stays.

    Raises:
        ValueError: if a key is missing, unknown or has another shape, or the model is merged, or has no adapters or
            none of that name.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora, lora_state_dict
        >>> trained, fresh = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> for model in (trained, fresh):
        ...     _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> load_lora_state_dict(fresh, lora_state_dict(trained))
    """
    if name is None or not is_adapted(model):
        all_or_nothing(model, lambda journal: load(model, state, journal))
    else:
        pairs = _pairs_in(state, model, name)
        all_or_nothing(model, lambda journal: load_part(model, pairs, journal))


def _pairs_in(state: Mapping[str, Any], model: nn.Module, name: str) -> dict[str, Any]:
    """The entries of the adapter ``name`` of ``model``."""
    own = lora_state_dict(model, name)
    missing = [key for key in own if key not in state]
    if missing:
        raise ValueError(
            f"`state` lacks `{missing[0]}` of the adapter `{name}` ({len(missing)} missing). Were `targets`, `exclude` "
            "and `name` the same when it was made?"
        )
    return {key: state[key] for key in own}


def load(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    """:func:`load_lora_state_dict` as a part of a larger change."""
    if not is_adapted(model):
        merged = is_merged(model)
        do = "call `unmerge_lora(model)` first" if merged else "call `apply_lora` with its configuration first"
        raise ValueError(f"The model has no {'live ' if merged else ''}adapters to load into: {do}.")
    if isinstance(state.get("state_dict"), Mapping):
        raise ValueError("`state` is a whole checkpoint: pass its entry 'state_dict'.")
    load_trained_state(model, state, journal)


def load_trained_state(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    """Load the result of :func:`trained_state` into a model that is adapted by the same method, as it is."""
    check_state(model, state)
    _load(model, state, journal)
    _reset_buffers(model, state, journal)
    _call_post_hooks(model)


def load_part(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    """Load these entries of a state of ``model``; everything else stays as it is.

    Raises:
        ValueError: as :func:`check_state`.
    """
    check_state(model, state, needed=())
    _load(model, state, journal)
    _call_post_hooks(model)


def check_state(model: nn.Module, state: Mapping[str, Any], needed: Iterable[str] | None = None) -> None:
    """Raise if ``state`` is not exactly an adapter of ``model``, or its values are none that training gives.

    Args:
        model: an adapted or merged model.
        state: of a file, or of another model.
        needed: the entries that it must have; ``None`` for those that every adapter of ``model`` has.

    Raises:
        ValueError: naming the first key that is missing, unknown, or of another shape or kind, or not finite.
    """
    present, frozen = clean_state(model) | merged_state(model), frozen_names(model)
    missing = [key for key in (needed_names(model) if needed is None else needed) if key not in state]
    unknown = [key for key in state if key not in present or key in frozen]
    if missing or unknown:
        wrong = [f"lacks `{key}`" for key in missing]
        wrong += [
            f"has {shown(key)}, which {'is frozen' if key in frozen else 'this model has not'}" for key in unknown
        ]
        raise ValueError(
            f"The adapter does not fit the model: it {wrong[0]} ({len(missing)} missing, {len(unknown)} unknown). Were "
            "`targets`, `exclude`, `bias`, `also_train` and `name` the same when it was made?"
        )
    buffers = buffer_names(model)
    for key, value in state.items():
        if isinstance(present[key], Tensor):
            _check_shape(key, value, tuple(shape_of(present[key])))
            check_value(key, value, present[key])
            if key not in buffers:  # the range of an observer begins at infinity
                check_finite(key, value, present[key])


def _check_shape(key: str, value: Any, expected: tuple[int, ...]) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != expected:
        what = f"has shape {shape}" if shape is not None else f"is a {type(value).__name__}"
        cause = "`r`" if key.endswith((".A", ".B")) else "the size of the model"
        raise ValueError(
            f"The adapter does not fit the model: `{key}` {what}, but the model needs {expected}. "
            f"Was {cause} the same when it was made?"
        )


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    reshard(model)
    for name, module in names.named_modules(model):
        present: dict[str, Any] = {}
        save_own(module, present, prefix := f"{name}." if name else "")
        new = {key: shard_like(value, state[key]) for key, value in present.items() if key in state}
        if new:
            journal.steps.append(LoadedStep(module, prefix, {key: present[key] for key in new}))
            _load_own(module, prefix, present, new)


def _call_post_hooks(model: nn.Module) -> None:
    for module in set(model.modules()) - set(fsdp1_units(model)):  # a module may compute something from what was loaded
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, nn.modules.module._IncompatibleKeys([], []))


class LoadedStep:
    """Entries of a state dict are loaded into one module.

    A ``_load_from_state_dict`` of the user's own may be what failed, so it is not used to copy tensors back.

    Args:
        module: the module.
        prefix: its name in the state dict, with a dot at the end.
        present: what is overwritten, by its keys in the state dict.
    """

    def __init__(self, module: nn.Module, prefix: str, present: dict[str, Any]) -> None:
        self.module, self.prefix, self.present = module, prefix, present
        own = {id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())}
        self.tensors = {
            key: full_tensor(value) if is_partitioned(value) else local_shard(value).clone()
            for key, value in present.items()
            if id(value) in own
        }
        self.rest = {key: copy.deepcopy(value) for key, value in present.items() if id(value) not in own}

    @torch.no_grad()
    def undo(self) -> None:
        """Give the module the old values."""
        tensors = [self.present[key] for key in self.tensors]
        with gathered(tensors, write=True):
            for tensor, value in zip(tensors, self.tensors.values(), strict=True):
                local_shard(tensor).copy_(value)
        if self.rest:
            _load_own(self.module, self.prefix, self.present, self.rest)


def _load_own(module: nn.Module, prefix: str, present: Mapping[str, Any], new: dict[str, Any]) -> None:
    errors: list[str] = []
    with gathered((present[key] for key in new if key in present), write=True):
        module._load_from_state_dict(new, prefix, {"version": module._version}, False, [], [], errors)
    if errors:
        raise RuntimeError("\n".join(errors))


def _reset_buffers(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    """Give buffers that are not in ``state`` their initial values."""
    name_of = {id(module): name for name, module in names.named_modules(model)}
    for module, key, original in list(moved(model)):
        if key in module._buffers and names.join(name_of[id(module)], key) not in state:
            journal.keep(module._buffers[key])  # type: ignore[arg-type]
            local_shard(module._buffers[key]).copy_(original)  # type: ignore[arg-type]
