"""The verbs that put adapters on a model, take them off and disable them, for any ``nn.Module``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, check_compute
from lightning_lora.distributed.sharded import is_sharded, local_shard, reshard
from lightning_lora.layers.adapted import adapted_modules, swap_out
from lightning_lora.layers.base import disable_adapters, is_adapted
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.model.copies import targets_of
from lightning_lora.model.freeze import trained_parameters
from lightning_lora.model.hooks import strip
from lightning_lora.model.initial_values import check_writable, moved, put_back, remember
from lightning_lora.model.inject import inject_each
from lightning_lora.model.journal import Journal, all_or_nothing, complete_undo
from lightning_lora.model.merge import unmerge
from lightning_lora.model.record import config_of, forget, is_merged, record_of
from lightning_lora.model.same_config import check_meant, check_same
from lightning_lora.model.several.one_adapter import drop_adapter, is_last
from lightning_lora.ops.workspace import Workspace
from lightning_lora.targets.resolve import Targets
from lightning_lora.targets.survey import Survey


def apply_lora(model: nn.Module, config: LoRAConfig, *, compute: str = "auto") -> list[str]:
    """Adapt the layers of ``model`` that ``config`` selects, in place, and freeze the rest: all of it, or nothing.

    Applying the same configuration again adds nothing; one with another ``name`` adds an adapter, and then all act
    (:func:`use_adapters` chooses). A merged model is unmerged first. The global random stream is not used. Until B is
    trained the outputs are the base's.

    Args:
        model: any module.
        config: what to adapt and how; of a LoRACallback, its ``config``.
        compute: the side of the equation. ``"activations"``: ``W0 x + scale * B (A x)``, a few small products for each
            layer. ``"weights"``: ``(W0 + scale * B A) x``, where neighbouring layers are summed together; it takes a
            gradient of each adapted weight and a copy of it. ``"auto"``: the weight's side on a GPU for layers and
            inputs so small that launching kernels takes longer than computing them, unless the sums of the model would
            take more than 3 GiB. Both sides give the same to rounding; sharded weights and dropout always take the
            activations' side. Write values under ``torch.no_grad()``: torch does not count a write through ``.data``,
            which a layer on the weight's side may see only at its second call.

    Returns:
        The names of the adapted modules.

    Raises:
        ValueError: if a target cannot be found or adapted, ``model`` has an adapter of that name and of another
            configuration, or ``compute="weights"`` is asked for with dropout.
        TypeError: if ``config`` is not a LoRAConfig.

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
    check_compute(compute, config)
    return all_or_nothing(model, lambda journal: adapt(model, config, journal, compute))


def adapt(model: nn.Module, config: LoRAConfig, journal: Journal, compute: str = "auto") -> list[str]:
    """:func:`apply_lora` as a part of a larger change."""
    survey = Survey(model)
    for each in config.each():
        check_same(survey, each)
    if is_merged(survey):
        reshard(model)
        unmerge(model, journal, Workspace())
        survey = Survey(model)
    wanted = checked_targets(survey, config)
    inject_each(wanted, compute=compute, kept=record_of(model).kept)
    remember(survey)
    return names_of(wanted)


def checked_targets(survey: Survey, config: LoRAConfig) -> list[tuple[Targets, LoRAConfig]]:
    """What each adapter of ``config`` means, and its configuration.

    Raises:
        ValueError: if a target cannot be found or adapted, or a layer is adapted that ``config`` does not mean.
    """
    wanted = [(targets_of(survey, each), each) for each in config.each()]
    for targets, each in wanted:
        targets.check()
        check_meant(targets, each.name)
    return wanted


def names_of(wanted: list[tuple[Targets, LoRAConfig]]) -> list[str]:
    """The names of the layers that get an adapter, each once."""
    return list(dict.fromkeys(name for targets, _ in wanted for name in targets.names()))


def remove_lora(model: nn.Module, *, name: str | None = None) -> None:
    """Make ``model`` what it was before :func:`apply_lora`, in place; a model without adapters stays as it is.

    Adapters go, merged ones too, and trained biases, ``also_train`` modules and buffers get their initial values back.
    To keep what was trained call ``merge_lora(model, undo=False)`` instead.

    Args:
        model: any module.
        name: only the adapter of that name goes, and the biases and ``also_train`` modules that no other adapter trains
            get their initial values back; buffers stay. If it alone acted, as a combination does, the others act again,
            fully.

    Raises:
        ValueError: if a merged weight was changed since, so that the base cannot be restored, what trains is
            partitioned by ZeRO 3, or there is no adapter ``name``, or a merged one.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> remove_lora(model)
        >>> type(model).__name__, list(model.state_dict())
        ('Linear', ['weight', 'bias'])
    """
    complete_undo(model)
    if name is not None and not is_last(model, name):
        all_or_nothing(model, lambda journal: drop_adapter(model, name, journal))
    elif isinstance(config_of(model), LoRAConfig | None):
        all_or_nothing(model, lambda journal: remove(model, journal))


def remove(model: nn.Module, journal: Journal) -> None:
    """:func:`remove_lora` for any method, as a part of a larger change."""
    if is_merged(model):
        reshard(model)
        unmerge(model, journal, Workspace())
    _check_not_partitioned(model)
    put_back(model, journal)
    _drop(model)


def drop_added(model: nn.Module) -> None:
    """Remove what a method added, with its hooks and records; the values of the base's own parameters stay."""
    all_or_nothing(model, lambda journal: _drop(model))


def _drop(model: nn.Module) -> None:
    for _, module in list(adapted_modules(model)):
        swap_out(module)
    strip(model)
    forget(model)


def disable_lora(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the ``with`` block ``model`` gives the base's outputs, with the initial biases, heads and buffers.

    Raises:
        ValueError: if ``model`` has no adapters, or they are merged, or partitioned by ZeRO 3.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> with disable_lora(model):
        ...     reference = model(torch.ones(4))
    """
    return Restoring(partial(_disable, model))


def _disable(model: nn.Module, undo: Undo) -> None:
    complete_undo(model)
    if is_merged(model):
        raise ValueError("The adapters are merged into the model: call `unmerge_lora(model)` before `disable_lora`.")
    if not is_adapted(model):
        raise ValueError("The model has no adapters to disable: call `apply_lora` first.")
    _check_not_partitioned(model)
    disable_adapters(model, undo)
    undo.append(partial(reshard, model))
    reshard(model)
    for module, key, original in list(moved(model)):
        _swap({**module._parameters, **module._buffers}[key], original, undo)


def _swap(tensor: Tensor | None, value: Tensor, undo: Undo) -> None:
    """Give ``tensor`` the ``value``. The memory of a sharded tensor stays, because FSDP holds it too."""
    assert tensor is not None
    if is_sharded(tensor):
        undo.append(partial(_copy, tensor, local_shard(tensor).clone()))
        _copy(tensor, value)
    else:
        undo.append(partial(setattr, tensor, "data", tensor.data))
        tensor.data = value.to(tensor.device, tensor.dtype, copy=True)


@torch.no_grad()
def _copy(tensor: Tensor, value: Tensor) -> None:
    local_shard(tensor).copy_(value)


def _check_not_partitioned(model: nn.Module) -> None:
    for name, parameter in trained_parameters(model):
        check_writable(name, parameter)
