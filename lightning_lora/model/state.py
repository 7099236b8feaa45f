"""The state dict of adapters: which entries of a model belong in an adapter file, and how they load."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
from lightning_lora.layers.base import LoRALayer, is_adapted
from lightning_lora.layers.linear import is_quantized_class
from lightning_lora.model.file_values import check_finite, check_value
from lightning_lora.model.freeze import trained_parameters
from lightning_lora.model.initial_values import moved
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.record import is_merged, merged_layers, records
from lightning_lora.model.written import written_before_merge, written_parameters
from lightning_lora.targets.survey import Survey, survey_of


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters with their names; those of a merged model come from its merge record.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(r=1, targets="all"))
        >>> {name: tuple(parameter.shape) for name, parameter in lora_parameters(model)}
        {'lora.default.A': (1, 4), 'lora.default.B': (2, 1)}
    """
    yield from adapter_parameters_in(survey_of(model))


def adapter_parameters_in(survey: Survey) -> Iterator[tuple[str, nn.Parameter]]:
    """As :func:`lora_parameters`, of a model that was surveyed."""
    live = ((name, module.lora) for name, module in survey.modules if isinstance(module, LoRALayer))
    merged = ((name, merged.adapters) for name, _, merged in merged_layers(survey))
    for name, adapters in [*((names.clean(name), adapters) for name, adapters in live), *merged]:
        for key, parameter in names.named_parameters(adapters):
            yield names.join(name, f"lora.{key}"), parameter


def lora_state_dict(model: nn.Module) -> dict[str, Any]:
    """The entries of ``model`` that an adapter file holds, under the model's own names.

    These are adapters, ``also_train`` modules, the biases that train, and buffers that changed since
    :func:`apply_lora` (BatchNorm updates its statistics though it is frozen), but no frozen parameter. As in torch's
    ``state_dict`` the tensors are the model's own memory: clone them to keep them while training continues. A plain
    model that loads ``model.state_dict()`` with ``strict=False`` computes as the base, and only the ``unexpected_keys``
    that torch returns say so: for a plain model write ``merged_state_dict(model)``.

    Raises:
        ValueError: if ``model`` has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> list(lora_state_dict(model))
        ['lora.default.A', 'lora.default.B']
    """
    if not has_adapters(model):
        raise ValueError("The model has no adapters, so there is no adapter to save: call `apply_lora` first.")
    live = keep_adapter(own_state(model), base_names(model))
    detached = {key: full_detached(value) for key, value in live.items()}
    return detached | _merged_state(model) | written_before_merge(model)


def full_detached(value: Any) -> Any:
    """The full tensor of a sharded one, detached; any other value as it is."""
    return full_tensor(value).detach() if isinstance(value, Tensor) else value


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` has adapters, live or merged."""
    return is_adapted(model) or is_merged(model)


def _merged_state(model: nn.Module) -> dict[str, Tensor]:
    adapters = {id(module): merged.adapters for _, module, merged in merged_layers(model)}
    return {
        names.join(name, f"lora.{key}"): parameter.detach()
        for name, module in names.named_modules(model)
        if id(module) in adapters
        for key, parameter in adapters[id(module)].named_parameters()
    }


def own_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``model`` under its present keys, each tensor as this rank has it.

    It is collected module by module, without hooks: a ``state_dict`` of the user's own may leave something out, and
    FSDP1's hook gathers all parameters of a unit.
    """
    reshard(model)
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        _save_own(module, state, f"{name}." if name else "")
    return state


def _save_own(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    # The entries that a quantized layer adds for its weight belong to the base.
    save = nn.Module._save_to_state_dict if is_quantized_class(type(module)) else type(module)._save_to_state_dict
    save(module, state, prefix, True)
    if prefix and type(module).state_dict is not nn.Module.state_dict:  # metrics add their own
        module.state_dict(destination=state, prefix=prefix, keep_vars=True)


def clean_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``model`` under clean names."""
    return {names.clean(key): value for key, value in own_state(model).items()}


def real_keys(model: nn.Module) -> dict[str, str]:
    """The present keys of the state dict of ``model``, with the names of wrappers in them, by clean name."""
    return {names.clean(key): key for key in own_state(model)}


def keep_adapter(state: Mapping[str, Any], base: set[str]) -> dict[str, Any]:
    """The entries of a model's state dict that belong in an adapter file, under clean names.

    Args:
        state: under any keys that wrappers make.
        base: the clean names that belong to the base.
    """
    return {names.clean(key): value for key, value in state.items() if names.clean(key) not in base}


def frozen_names(model: nn.Module) -> set[str]:
    """The names, under every alias, of the parameters that no file holds: they neither train nor change."""
    saved = {id(parameter) for _, parameter in (*trained_parameters(model), *written_parameters(model))}
    aliases = model.named_parameters(remove_duplicate=False)
    return {names.clean(name) for name, parameter in aliases if id(parameter) not in saved}


def base_names(model: nn.Module) -> set[str]:
    """The names, under every alias, that no adapter file holds: frozen parameters and unchanged buffers."""
    changed = {id(module._buffers.get(key)) for module, key, _ in moved(model)}
    recorded = {id(module._buffers.get(key)) for _, module, record in records(model) for key in record.originals}
    aliases = model.named_buffers(remove_duplicate=False)
    return frozen_names(model) | {names.clean(name) for name, buffer in aliases if id(buffer) in recorded - changed}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the result of :func:`lora_state_dict` into a model with the same adapters: all of it, or nothing.

    Buffers that are not in ``state`` had not changed when it was made: they get their initial values back.

    Raises:
        ValueError: if a key is missing, unknown or has another shape, or the model is merged or has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> trained, fresh = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> for model in (trained, fresh):
        ...     _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> load_lora_state_dict(fresh, lora_state_dict(trained))
    """
    all_or_nothing(model, lambda journal: load(model, state, journal))


def load(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    """:func:`load_lora_state_dict` as a part of a larger change."""
    if not is_adapted(model):
        merged = is_merged(model)
        do = "call `unmerge_lora(model)` first" if merged else "call `apply_lora` with its configuration first"
        raise ValueError(f"The model has no {'live ' if merged else ''}adapters to load into: {do}.")
    if isinstance(state.get("state_dict"), Mapping):
        raise ValueError("`state` is a whole checkpoint: pass its entry 'state_dict'.")
    check_state(model, state)
    _load(model, state, journal)


def check_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if ``state`` is not exactly an adapter of ``model``, or its values are none that training gives.

    Raises:
        ValueError: naming the first key that is missing, unknown, or of another shape or kind, or not finite.
    """
    present, frozen = clean_state(model) | _merged_state(model), frozen_names(model)
    missing = [key for key in needed_names(model) if key not in state]
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


def needed_names(model: nn.Module) -> list[str]:
    """The names that every adapter file of ``model`` has: what trains, and what is neither parameter nor buffer."""
    optional = frozen_names(model) | buffer_names(model)
    return [key for key in clean_state(model) | _merged_state(model) if key not in optional]


def buffer_names(model: nn.Module) -> set[str]:
    """The names of all buffers, under every alias."""
    return {names.clean(name) for name, _ in model.named_buffers(remove_duplicate=False)}


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Any], journal: Journal) -> None:
    reshard(model)
    for name, module in names.named_modules(model):
        present: dict[str, Any] = {}
        _save_own(module, present, prefix := f"{name}." if name else "")
        new = {key: shard_like(value, state[key]) for key, value in present.items() if key in state}
        if new:
            journal.steps.append(LoadedStep(module, prefix, {key: present[key] for key in new}))
            _load_own(module, prefix, present, new)
    _reset_buffers(model, state, journal)
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
