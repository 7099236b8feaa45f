"""Copies of adapted modules that the user's code puts into the model: they become plain modules.

A reference, a teacher or a target network is often ``copy.deepcopy(self.net)``. Where the network is adapted already,
its copy is adapted too, though no configuration means it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import local_shard
from lightning_lora.layers.adapted import Adapted, added_to, has_added, swap_out
from lightning_lora.layers.base import LoRALayer, parameter_of, pop_adapters
from lightning_lora.layers.quantized.formats import is_quantized
from lightning_lora.model.initial_values import is_trained, put_back_own, remember
from lightning_lora.model.journal import Journal, Overwritten, all_or_nothing
from lightning_lora.model.merge_layer import merge_layer, unmerge_layer
from lightning_lora.model.record import is_merged_layer, is_plain_copy, is_tuned, prune, record_of, release
from lightning_lora.ops.workspace import Workspace
from lightning_lora.targets.resolve import Targets, find_targets
from lightning_lora.targets.survey import Survey


def targets_of(model: nn.Module | Survey, config: LoRAConfig) -> Targets:
    """What ``config`` means in ``model``, without the copies that were made plain after an earlier injection."""
    targets = find_targets(model, config)
    targets.sites = [site for site in targets.sites if not is_plain_copy(site.module)]
    return targets


def copied_names(model: nn.Module) -> set[str]:
    """The names of the parameters of those copies: they are no part of the base."""
    return {
        names.join(name, key)
        for name, module in names.named_modules(model)
        if is_plain_copy(module)
        for key in module._parameters
    }


def has_copies(model: nn.Module, known: Iterable[nn.Module]) -> bool:
    """Whether modules with adapters, live or merged, came into ``model``, which had the modules ``known`` before."""
    return any(_has_adapters(module) for _, copy in _outermost(model, known) for module in copy.modules())


def make_plain(
    model: nn.Module, known: Iterable[nn.Module], meant: Collection[int] = (), *, mark: bool = False
) -> list[str]:
    """Take the adapters off the modules that came into ``model`` as copies. What the copies compute stays.

    Args:
        model: any module.
        known: the modules that it had before.
        meant: the ``id`` of modules that keep their adapters.
        mark: whether the copies stay plain wherever ``model`` is adapted again, and are no part of its base.

    Returns:
        The names of the outermost copies.
    """
    return _take_off_each(model, known, meant, _leave_update, mark)


def make_base(model: nn.Module, known: Iterable[nn.Module], meant: Collection[int] = ()) -> list[str]:
    """Make the modules that came into ``model`` as copies what they copied, without its adapters and their update.

    For the arguments see :func:`make_plain`.
    """
    return _take_off_each(model, known, meant, _take_update_out, mark=False)


def _take_off_each(
    model: nn.Module,
    known: Iterable[nn.Module],
    meant: Collection[int],
    take_off: Callable[[nn.Module, Journal], None],
    mark: bool,
) -> list[str]:
    def change(journal: Journal) -> list[str]:
        copies = []
        for name, copy in list(_outermost(model, known)):
            layers = [module for module in copy.modules() if _has_adapters(module) and id(module) not in meant]
            if layers:
                keep_flags = any(parameter.requires_grad for parameter in _adapter_parameters(layers))
                for layer in layers:
                    take_off(layer, journal)
                _release(copy, keep_flags, mark)
                copies.append(names.clean(name))
        if copies:
            prune(model)
            remember(model)
        return copies

    return all_or_nothing(model, change)


def _outermost(model: nn.Module, known: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The new modules in which there is nothing that was known: what a strategy wraps around the model is no copy."""
    before = set(map(id, known))
    covered = set(before)
    for name, module in names.each_module_once(model):
        if id(module) not in covered:
            inside = set(map(id, module.modules()))
            if before.isdisjoint(inside):
                covered |= inside
                yield name, module


def _has_adapters(module: nn.Module) -> bool:
    return has_added(module) or is_merged_layer(module) or is_tuned(module)


def _adapter_parameters(layers: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for layer in layers:
        if isinstance(layer, Adapted):
            yield from added_to(layer).parameters()
        elif is_tuned(layer):
            yield from (parameter_of(layer, key) for key in record_of(layer).trained)


def _leave_update(layer: nn.Module, journal: Journal) -> None:
    """Take the adapters off; an update that was trained before the copy was made is in its weights then, for good."""
    if isinstance(layer, Adapted) and not isinstance(layer, LoRALayer):
        if not layer.leave_update(partial(_keep_once, journal)) and is_trained(added_to(layer)):
            raise ValueError(
                f"A copy of a {type(layer).original_class.__name__} with a trained {layer.method_key} came into the "
                f"model, and no weight can hold what a {layer.method_key} does, so it cannot be made a plain copy. "
                "Copy the model before it is adapted, in its `__init__`."
            )
        swap_out(layer)
    if not isinstance(layer, LoRALayer):
        return  # it is merged, or its own weights are trained
    if not _is_trained(layer):
        pop_adapters(layer)
    elif not is_quantized(layer):  # which cannot hold the sum
        merge_layer(layer, journal, Workspace())


def _keep_once(journal: Journal, tensor: Tensor) -> bool:
    """Record ``tensor`` before it is overwritten; false if it, or one in the same memory, was recorded before."""
    kept = {step.tensor.data_ptr() for step in journal.steps if isinstance(step, Overwritten)}
    if local_shard(tensor).data_ptr() in kept:
        return False
    journal.keep(tensor)
    return True


def _take_update_out(layer: nn.Module, journal: Journal) -> None:
    merged = None if isinstance(layer, LoRALayer) else record_of(layer).merged
    if merged is not None:
        unmerge_layer(layer, merged, journal, Workspace())
    if isinstance(layer, Adapted):
        swap_out(layer)
    elif is_tuned(layer):
        put_back_own(layer, journal)


def _is_trained(layer: LoRALayer) -> bool:
    every_B = [local_shard(adapter.B) for adapter in layer.lora.all_pairs()]
    return any(not B.is_meta and bool(B.any()) for B in every_B)


def _release(copy: nn.Module, keep_flags: bool, mark: bool) -> None:
    for module in reversed(list(copy.modules())):
        inside = [inner for inner in module.modules() if isinstance(inner, Adapted)]
        if inside == [module] and not has_added(module):  # swapped only for what was adapted in it
            swap_out(inside[0])
            inside = []
        if not inside:
            release(module, keep_flags, mark)
