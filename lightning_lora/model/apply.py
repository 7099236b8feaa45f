"""The verbs that put adapters on a model and take them off, on any ``nn.Module``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import is_partitioned, is_sharded, local_shard, reshard
from lightning_lora.layers.adapter import Adapter, Adapters, Pairs, seed_of
from lightning_lora.layers.base import (
    LoRALayer,
    adapted_layers,
    adapters_disabled,
    attach,
    detach,
    is_adapted,
    parameter_of,
)
from lightning_lora.layers.registry import class_for, host_of, swapped_class
from lightning_lora.layers.weight_view import Part
from lightning_lora.model.adapter_loading import accept_adapters
from lightning_lora.model.freeze import freeze, trained_parameters, unfreeze
from lightning_lora.model.hooks import accept_base, be_strict, leave_graphs, start_graphs
from lightning_lora.model.initial_values import moved, put_back, remember
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.model.record import config_of, forget, is_merged, record_of
from lightning_lora.model.shared_inputs import join_siblings
from lightning_lora.model.tied import memory_of, parameter_holders
from lightning_lora.names import join
from lightning_lora.targets.resolve import Targets, find_targets


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Adapt the modules of ``model`` that ``config`` means, in place, and freeze the rest.

    Applying the same configuration again adds nothing; on a merged model it unmerges first. The global random stream
    is untouched, and until B is trained the outputs are the base's.

    Args:
        model: any module.
        config: what to adapt and how.

    Returns:
        The names of the adapted modules.

    Raises:
        ValueError: if a target cannot be found or adapted, or ``model`` was adapted by another configuration.
        TypeError: if ``config`` is no LoRAConfig.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> apply_lora(model, LoRAConfig(r=2, targets="all"))
        ['0', '2']
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora.default.A', '0.lora.default.B', '2.lora.default.A', '2.lora.default.B']
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"`config` must be a LoRAConfig, but got a {type(config).__name__}. A callback has one, its `.config`."
        )
    check_same(model, config)
    if is_merged(model):
        unmerge_lora(model)
    targets = find_targets(model, config)
    targets.check()
    inject(model, targets, config)
    remember(model)
    return list(targets.modules)


def inject(model: nn.Module, targets: Targets, config: LoRAConfig) -> None:
    """Adapt those of ``targets`` that are not yet adapted, and freeze the rest."""
    _check_name_is_free(config.name)
    holders = parameter_holders(model)
    made = {name: _made(name, targets, config) for name, module in targets.modules.items() if not _has_pairs(module)}
    for name, module in targets.modules.items():
        if name not in made:
            _renew_dropout(module, config)
            continue
        attach(module, *made[name])
        parts = targets.parts[name]
        record_of(module).shared |= {part.key for part in parts if holders[memory_of(module, part.key)] > 1}
    attach_hosts(model)
    join_siblings(model)
    record_of(model).config = config
    freeze(model, config)
    accept_base(model)
    accept_adapters(model)
    start_graphs(model)


def _check_name_is_free(name: str) -> None:
    if hasattr(Adapters(), name):
        raise ValueError(
            f"`name` must not be an attribute of nn.ModuleDict, which holds the adapters, but got {name!r}."
        )


def _has_pairs(module: nn.Module) -> bool:
    return isinstance(module, LoRALayer) and bool(module.lora.every())


def _made(name: str, targets: Targets, config: LoRAConfig) -> tuple[type[LoRALayer], Adapters]:
    module, parts = targets.modules[name], targets.parts[name]
    cls = class_for(module, parts)
    return cls, Adapters({config.name: new_adapters(targets.names[name], module, parts, cls, config)})


def new_adapters(
    known_as: list[str], module: nn.Module, parts: list[Part], cls: type[LoRALayer], config: LoRAConfig
) -> Adapter | Pairs:
    """The pair of ``config`` for a module with all its names, or one for each of its ``parts``."""
    if not parts[0].name:
        return new_adapter(known_as, module, parts[0], cls, config)
    named = {part.name: [join(name, part.name) for name in known_as] + known_as for part in parts}
    return Pairs({part.name: new_adapter(named[part.name], module, part, cls, config) for part in parts})


def new_adapter(
    known_as: list[str], module: nn.Module, part: Part, cls: type[LoRALayer], config: LoRAConfig
) -> Adapter:
    """The pair of ``config`` for one matrix with all its names, where its weight lives."""
    weight = parameter_of(module, part.key)
    in_features, out_features = part.features(weight)
    return cls.lora_adapter_class(
        in_features,
        out_features,
        r=config.rank_for(*known_as),
        alpha=config.alpha_for(*known_as),
        scale=config.scale_for(*known_as),
        dropout=config.dropout,
        init=config.init,
        seed=seed_of(config.seed, known_as[0], config.name),
        part=part,
        stack=part.stack(weight),
        device=weight.device,
        **cls.lora_arguments(module),
    )


def attach_hosts(model: nn.Module) -> None:
    """Swap the modules that read the weights of adapted layers inside, so that they see the adapters."""
    for module in list(model.modules()):
        host = host_of(type(module))
        if host is not None and not isinstance(module, LoRALayer) and is_adapted(module):
            attach(module, swapped_class(type(module)), Adapters())


def _renew_dropout(layer: nn.Module, config: LoRAConfig) -> None:
    for adapter in layer.lora.every() if isinstance(layer, LoRALayer) else []:
        adapter.dropout = config.dropout


IDENTITY = ("name", "r", "alpha", "rslora", "targets", "exclude", "rank_pattern", "alpha_pattern", "bias", "also_train")


def difference(one: LoRAConfig, other: LoRAConfig) -> str | None:
    """The first argument in which two configurations mean different adapters, as ``r=4 instead of r=8``."""
    first, second = one.to_dict(), other.to_dict()
    for key in IDENTITY:
        if _ordered(first[key]) != _ordered(second[key]) and not (key == "alpha" and _same_alpha(one, other)):
            return f"`{key}={second[key]!r}` instead of `{key}={first[key]!r}`"
    return None


def _ordered(value: object) -> object:
    """Of patterns the first that matches counts, so that their order matters; none are as good as an empty list."""
    return (list(value.items()) if isinstance(value, dict) else value) or None


def _same_alpha(one: LoRAConfig, other: LoRAConfig) -> bool:
    """``alpha=None`` is each layer's rank: a number only where all layers have the same."""
    return not one.rank_pattern and not other.rank_pattern and (one.alpha or one.r) == (other.alpha or other.r)


def check_same(model: nn.Module, config: LoRAConfig) -> None:
    """Raise if ``model`` carries adapters, live or merged, of another configuration.

    Raises:
        ValueError: naming the first difference and the ways out.
    """
    present = config_of(model)
    other = difference(present, config) if present is not None else None
    if other is not None:
        raise ValueError(
            f"The model already has adapters{' (merged)' if is_merged(model) else ''}, and this asks for {other}. To "
            "start over on the original base call `remove_lora(model)`; to keep what was trained as the new base call "
            "`merge_lora(model, undo=False)`; to continue, ask for the same."
        )


def remove_lora(model: nn.Module) -> None:
    """Make ``model`` again what it was before :func:`apply_lora`, in place; nothing happens to one without adapters.

    It takes everything back: adapters, merged ones too, and the values of trained biases, ``also_train`` modules and
    buffers. To keep them call ``merge_lora(model, undo=False)`` instead.

    Raises:
        ValueError: if a merged weight was changed since, so that the base cannot be restored, or what trains is
            partitioned by ZeRO 3.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> remove_lora(model)
        >>> type(model).__name__, list(model.state_dict())
        ('Linear', ['weight', 'bias'])
    """
    if is_merged(model):
        unmerge_lora(model)
    _check_whole(model)
    put_back(model)
    drop_adapters(model)


def drop_adapters(model: nn.Module) -> None:
    """Take live adapters off, and every trace of them; the values of the rest stay as they are."""
    for _, layer in list(adapted_layers(model)):
        detach(layer)
    be_strict(model)
    leave_graphs(model)
    unfreeze(model)
    forget(model)


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Give the base's outputs inside the ``with`` block, its own biases, heads and buffers included.

    Raises:
        ValueError: if ``model`` has no adapters, or they are merged, or partitioned by ZeRO 3.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> with disable_lora(model):
        ...     reference = model(torch.ones(4))
    """
    if is_merged(model):
        raise ValueError("The adapters are merged into the model: call `unmerge_lora(model)` before `disable_lora`.")
    if not is_adapted(model):
        raise ValueError("The model has no adapters to disable: call `apply_lora` first.")
    _check_whole(model)
    trained = _swap_originals(model)
    try:
        with adapters_disabled(model):
            yield
    finally:
        reshard(model)
        for tensor, value in trained:
            _put(tensor, value)


def _check_whole(model: nn.Module) -> None:
    for name, parameter in trained_parameters(model):
        if is_partitioned(parameter):
            raise ValueError(
                f"`{name}` is partitioned by ZeRO 3, and the values that the base had before cannot be put there. Load "
                "the adapter's file into a model on one device, and ask that."
            )


def _swap_originals(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    trained: list[tuple[Tensor, Tensor]] = []
    reshard(model)
    for module, key, original in list(moved(model)):
        tensor = {**module._parameters, **module._buffers}[key]
        assert tensor is not None
        trained.append((tensor, local_shard(tensor).clone() if is_sharded(tensor) else tensor.data))
        _put(tensor, original.to(tensor.device, tensor.dtype, copy=True))
    return trained


@torch.no_grad()
def _put(tensor: Tensor, value: Tensor) -> None:
    """Let ``tensor`` have ``value``; FSDP knows a sharded one by its memory, which must stay."""
    if is_sharded(tensor):
        local_shard(tensor).copy_(value)
    else:
        tensor.data = value
