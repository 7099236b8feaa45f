"""The state dict of adapters: which entries of a model belong in an adapter file, and their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import (
    full_tensor,
    reshard,
)
from lightning_lora.foreign import QUANTIZING_LIBRARIES, is_from
from lightning_lora.layers.adapted import Adapted, added_to
from lightning_lora.layers.base import LoRALayer, is_adapted
from lightning_lora.model.freeze import adapter_parameters, in_files
from lightning_lora.model.initial_values import moved
from lightning_lora.model.record import is_merged, merged_children, merged_layers, records
from lightning_lora.model.several.one_adapter import check_name
from lightning_lora.model.written import written_before_merge, written_parameters
from lightning_lora.targets.survey import Survey, survey_of


def lora_parameters(model: nn.Module, *, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters with their names; those of a merged model come from its merge record.

    Args:
        model: any module.
        name: only those of the adapter of that name.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(r=1, targets="all"))
        >>> {name: tuple(parameter.shape) for name, parameter in lora_parameters(model)}
        {'lora.default.A': (1, 4), 'lora.default.B': (2, 1)}
    """
    chosen = None if name is None else parameters_of(model, name)
    for key, parameter in added_parameters(model, LoRALayer):
        if chosen is None or id(parameter) in chosen:
            yield key, parameter


def parameters_of(model: nn.Module, name: str) -> set[int]:
    """The ``id`` of each parameter of the adapter ``name``, live or merged."""
    live = [layer.lora for layer in survey_of(model).layers()]
    every = [*live, *(merged.adapters for _, _, merged in merged_layers(model))]
    return {id(parameter) for adapters in every if name in adapters for parameter in adapters[name].parameters()}


def added_parameters(model: nn.Module | Survey, kind: type[Adapted] = Adapted) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a method added to ``model``, with their names; those of a merged model too.

    Args:
        model: any module.
        kind: only those of modules that are adapted by this class.
    """
    survey = survey_of(model)
    live = [(names.clean(name), module) for name, module in survey.modules if isinstance(module, kind)]
    added = [(names.join(name, module.method_key), added_to(module)) for name, module in live]
    merged = [(names.join(name, "lora"), merged.adapters) for name, _, merged in merged_layers(survey)]
    others = merged_children(survey) if kind is Adapted else []
    merged_too = [(names.join(name, other.key), other.child) for name, _, other in others]
    for name, child in [*added, *merged, *merged_too]:
        for key, parameter in names.named_parameters(child):
            yield names.join(name, key), parameter


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The entries of ``model`` that an adapter file holds, under the model's own names.

    These are adapters, ``also_train`` modules, the biases that train, and buffers that changed since
    :func:`apply_lora` (BatchNorm updates its statistics though it is frozen), but no frozen parameter. As in torch's
    ``state_dict`` the tensors are the model's own memory: clone them to keep them while training continues. A plain
    model that loads ``model.state_dict()`` with ``strict=False`` computes as the base, and only the ``unexpected_keys``
    that torch returns say so: for a plain model write ``merged_state_dict(model)``.

    Args:
        model: a model with adapters, live or merged.
        name: only A and B of the adapter of that name: whatever else trains belongs to all adapters.

    Raises:
        ValueError: if ``model`` has no adapters, or none of that name.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> list(lora_state_dict(model))
        ['lora.default.A', 'lora.default.B']
    """
    if not has_adapters(model):
        raise ValueError("The model has no adapters, so there is no adapter to save: call `apply_lora` first.")
    return trained_state(model) if name is None else _pairs_state(model, name)


def _pairs_state(model: nn.Module, name: str) -> dict[str, Any]:
    check_name(model, name)
    with_it = {id(layer) for layer in survey_of(model).layers() if name in layer.lora}
    with_it |= {id(module) for _, module, merged in merged_layers(model) if name in merged.adapters}
    places = (place for place, module in names.named_modules(model) if id(module) in with_it)
    prefixes = tuple(names.join(place, f"lora.{name}.") for place in places)
    return {key: value for key, value in trained_state(model).items() if key.startswith(prefixes)}


def trained_state(model: nn.Module) -> dict[str, Any]:
    """As :func:`lora_state_dict`, of a model that is adapted by whatever method."""
    live = keep_adapter(own_state(model), base_names(model))
    detached = {key: full_detached(value) for key, value in live.items()}
    return detached | merged_state(model) | written_before_merge(model)


def full_detached(value: Any) -> Any:
    """The full tensor of a sharded one, detached; any other value as it is."""
    return full_tensor(value).detach() if isinstance(value, Tensor) else value


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` has adapters, live or merged."""
    return is_adapted(model) or is_merged(model)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters in the merge records of ``model``, by name."""
    added: dict[int, tuple[str, nn.Module]] = {
        **{id(module): ("lora", merged.adapters) for _, module, merged in merged_layers(model)},
        **{id(module): (merged.key, merged.child) for _, module, merged in merged_children(model)},
    }
    return {
        names.join(name, f"{method}.{key}"): parameter.detach()
        for name, module in names.named_modules(model)
        if id(module) in added
        for method, child in [added[id(module)]]
        for key, parameter in child.named_parameters()
    }


def own_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``model`` under its present keys, each tensor as this rank has it.

    It is collected module by module, without hooks: a ``state_dict`` of the user's own may leave something out, and
    FSDP1's hook gathers all parameters of a unit.
    """
    reshard(model)
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        save_own(module, state, f"{name}." if name else "")
    return state


def save_own(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Put the entries of ``module`` itself into ``state``, under keys that begin with ``prefix``."""
    # The entries that a quantized module adds for its weight belong to the base.
    of_library = is_from(type(module), *QUANTIZING_LIBRARIES)
    save = nn.Module._save_to_state_dict if of_library else type(module)._save_to_state_dict
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
    saved = {id(parameter) for _, parameter in (*in_files(model), *written_parameters(model))}
    saved |= adapter_parameters(model).keys()  # those that do not train, too
    aliases = model.named_parameters(remove_duplicate=False)
    return {names.clean(name) for name, parameter in aliases if id(parameter) not in saved}


def base_names(model: nn.Module) -> set[str]:
    """The names, under every alias, that no adapter file holds: frozen parameters and unchanged buffers."""
    changed = {id(module._buffers.get(key)) for module, key, _ in moved(model)}
    recorded = {id(module._buffers.get(key)) for _, module, record in records(model) for key in record.originals}
    aliases = model.named_buffers(remove_duplicate=False)
    return frozen_names(model) | {names.clean(name) for name, buffer in aliases if id(buffer) in recorded - changed}


def needed_names(model: nn.Module) -> list[str]:
    """The names that every adapter file of ``model`` has: what trains, and what is neither parameter nor buffer."""
    optional = frozen_names(model) | buffer_names(model)
    return [key for key in clean_state(model) | merged_state(model) if key not in optional]


def buffer_names(model: nn.Module) -> set[str]:
    """The names of all buffers, under every alias."""
    return {names.clean(name) for name, _ in model.named_buffers(remove_duplicate=False)}
