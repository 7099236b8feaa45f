"""What an adapter is as data: what belongs in a file is asked here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import (
    fsdp1_units,
    full_tensor,
    gathered,
    local_shard,
    reshard,
    shape_of,
    shard_like,
)
from lightning_lora.layers.base import adapted_layers, is_adapted
from lightning_lora.layers.linear import is_quantizing
from lightning_lora.model.freeze import trained_parameters
from lightning_lora.model.initial_values import moved
from lightning_lora.model.record import is_merged, merged_layers, records


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters with their names; those of a merged model come from its merge record.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(r=1, targets="all"))
        >>> {name: tuple(parameter.shape) for name, parameter in lora_parameters(model)}
        {'lora.default.A': (1, 4), 'lora.default.B': (2, 1)}
    """
    holders = [(name, layer.lora) for name, layer in adapted_layers(model)]
    holders += [(name, merged.adapters) for name, _, merged in merged_layers(model)]
    for name, adapters in holders:
        for key, parameter in adapters.named_parameters():
            yield names.join(name, f"lora.{key}"), parameter


def lora_state_dict(model: nn.Module) -> dict[str, Any]:
    """What an adapter file holds, under the model's own names.

    Adapters, ``also_train`` modules, the biases that train, and buffers that changed since :func:`apply_lora` (the
    statistics of BatchNorm move though it is frozen). No frozen parameter is in it. As in torch's ``state_dict`` the
    tensors are the model's own memory: clone them to keep them while training goes on.

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
    own = keep_adapter(model, own_state(model))
    return {key: full_detached(value) for key, value in own.items()} | _merged_state(model)


def full_detached(value: Any) -> Any:
    """``value`` as it is given away: whole, and without a gradient."""
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
    """What the state dict of ``model`` holds under the keys that it has now, each tensor as this rank has it.

    It is asked of every module by itself, past its hooks: a ``state_dict`` of the user's own may leave something out,
    and FSDP1 gathers all of a unit's parameters in its own.
    """
    reshard(model)
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        _save_own(module, state, f"{name}." if name else "")
    return state


def _save_own(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    # What a quantized layer writes beside its weight belongs to the base.
    save = nn.Module._save_to_state_dict if is_quantizing(type(module)) else type(module)._save_to_state_dict
    save(module, state, prefix, True)
    if prefix and type(module).state_dict is not nn.Module.state_dict:  # metrics add their own
        module.state_dict(destination=state, prefix=prefix, keep_vars=True)


def clean_state(model: nn.Module) -> dict[str, Any]:
    """The same under the model's own names."""
    return {names.clean(key): value for key, value in own_state(model).items()}


def real_keys(model: nn.Module) -> dict[str, str]:
    """The keys that the state dict of ``model`` has now, whatever wraps its modules, by clean name."""
    return {names.clean(key): key for key in own_state(model)}


def keep_adapter(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict of ``model`` that belong in an adapter file, under clean names."""
    base = base_names(model)
    return {names.clean(key): value for key, value in state.items() if names.clean(key) not in base}


def frozen_names(model: nn.Module) -> set[str]:
    """The names, under every alias, of the parameters that do not train."""
    keep = {id(parameter) for _, parameter in trained_parameters(model)}
    every = model.named_parameters(remove_duplicate=False)
    return {names.clean(name) for name, parameter in every if id(parameter) not in keep}


def base_names(model: nn.Module) -> set[str]:
    """The names, under every alias, of what is no part of an adapter: frozen parameters and unchanged buffers."""
    changed = {id(module._buffers.get(key)) for module, key, _ in moved(model)}
    known = {id(module._buffers.get(key)) for _, module, record in records(model) for key in record.originals}
    every = model.named_buffers(remove_duplicate=False)
    return frozen_names(model) | {names.clean(name) for name, buffer in every if id(buffer) in known - changed}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`lora_state_dict` gave into a model with the same adapters: everything, or nothing at all.

    Buffers that ``state`` does not name had not changed when it was made, and get their first values back.

    Raises:
        ValueError: if a key is missing, unknown or has another shape, or the model is merged or has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> one, other = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> for model in (one, other):
        ...     _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> load_lora_state_dict(other, lora_state_dict(one))
    """
    if not is_adapted(model):
        merged = is_merged(model)
        do = "call `unmerge_lora(model)` first" if merged else "call `apply_lora` with its configuration first"
        raise ValueError(f"The model has no {'live ' if merged else ''}adapters to load into: {do}.")
    if isinstance(state.get("state_dict"), Mapping):
        raise ValueError("`state` is a whole checkpoint: pass its entry 'state_dict'.")
    check_state(model, state)
    _load(model, state)


def check_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if ``state`` is not exactly an adapter of ``model``.

    Raises:
        ValueError: naming the first key that is missing, unknown or of another shape.
    """
    own, frozen = clean_state(model) | _merged_state(model), frozen_names(model)
    missing = [key for key in needed_names(model) if key not in state]
    unknown = [key for key in state if key not in own or key in frozen]
    if missing or unknown:
        found = [f"lacks `{key}`" for key in missing]
        found += [f"has `{key}`, which {'is frozen' if key in frozen else 'this model has not'}" for key in unknown]
        raise ValueError(
            f"The adapter does not fit the model: it {found[0]} ({len(missing)} missing, {len(unknown)} unknown). Were "
            "`targets`, `exclude`, `bias`, `also_train` and `name` the same when it was made?"
        )
    for key, value in state.items():
        if isinstance(own[key], Tensor):
            _check_shape(key, value, own[key])


def _check_shape(key: str, value: Any, own: Tensor) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != tuple(shape_of(own)):
        what = f"has shape {shape}" if shape is not None else f"is a {type(value).__name__}"
        cause = "`r`" if key.endswith((".A", ".B")) else "the size of the model"
        raise ValueError(
            f"The adapter does not fit the model: `{key}` {what}, but the model needs {tuple(shape_of(own))}. "
            f"Was {cause} the same when it was made?"
        )


def needed_names(model: nn.Module) -> list[str]:
    """The names that every adapter of ``model`` has: all that trains, and what is neither parameter nor buffer."""
    no_need = frozen_names(model) | buffer_names(model)
    return [key for key in clean_state(model) | _merged_state(model) if key not in no_need]


def buffer_names(model: nn.Module) -> set[str]:
    """The names of all buffers, under every alias."""
    return {names.clean(name) for name, _ in model.named_buffers(remove_duplicate=False)}


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    reshard(model)
    before: list[tuple[nn.Module, str, dict[str, Any]]] = []
    try:
        for name, module in names.named_modules(model):
            own: dict[str, Any] = {}
            _save_own(module, own, prefix := f"{name}." if name else "")
            found = {key: shard_like(value, state[key]) for key, value in own.items() if key in state}
            before.append((module, prefix, {key: _copied(own[key]) for key in found}))
            _load_own(module, prefix, own, found)
    except BaseException:
        for module, prefix, kept in before:
            _load_own(module, prefix, {}, kept)
        raise
    _reset_buffers(model, state)
    # Modules that keep something in addition to what was loaded are notified.
    for module in set(model.modules()) - set(fsdp1_units(model)):
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, nn.modules.module._IncompatibleKeys([], []))


def _copied(value: Any) -> Any:
    return full_detached(value).clone() if isinstance(value, Tensor) else value


def _load_own(module: nn.Module, prefix: str, own: Mapping[str, Any], found: dict[str, Any]) -> None:
    if not found:
        return
    errors: list[str] = []
    with gathered((own[key] for key in found if key in own), write=True):
        module._load_from_state_dict(found, prefix, {"version": module._version}, False, [], [], errors)
    if errors:
        raise RuntimeError("\n".join(errors))


def _reset_buffers(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give buffers that ``state`` does not name their first values."""
    name_of = {id(module): name for name, module in names.named_modules(model)}
    for module, key, original in list(moved(model)):
        if key in module._buffers and names.join(name_of[id(module)], key) not in state:
            local_shard(module._buffers[key]).copy_(original)  # type: ignore[arg-type]
