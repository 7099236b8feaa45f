"""Training in a random subspace as a method of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.distributed.sharded import reshard
from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.adapter import seed_of
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.base import Watched
from lightning_lora.methods.subspace.config import SubspaceConfig
from lightning_lora.methods.subspace.connections import connect, holders, subspaces
from lightning_lora.methods.subspace.layer import Subspace, mixin_for
from lightning_lora.methods.subspace.merge import merge, merged_modules, merged_values, unmerge
from lightning_lora.methods.subspace.sites import Keys, projected
from lightning_lora.model.apply import remove
from lightning_lora.model.freeze import unfreeze
from lightning_lora.model.hooks import equip, strip
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.record import holders as adapted_as_a_whole
from lightning_lora.model.report.summary import rest_trained
from lightning_lora.names import counted, join
from lightning_lora.targets.survey import Survey


class SubspaceMethod(AddedMethod):
    """``theta = theta_0 + P z`` (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255).

    Args:
        config: the arguments.

    Example:
        >>> method, model = SubspaceMethod(SubspaceConfig(dimension=5)), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> method.complete(model)
        ['0', '1']
        >>> [(name, p.numel()) for name, p in method.trained_parameters(model)]
        [('0.subspace.z', 5)]
    """

    key: ClassVar[str] = "subspace"
    reads_weights_by_name: ClassVar[bool] = True
    config_class: ClassVar[type[SubspaceConfig]] = SubspaceConfig
    config: SubspaceConfig

    @override
    def sites(self, survey: Survey) -> dict[str, nn.Module]:
        return {name: survey.by_name[name] for name in projected(survey, self.config)}

    @override
    def mixin(self, module: nn.Module) -> type[Adapted]:
        return mixin_for(module)

    @override
    def children(self, survey: Survey, fresh: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The first module of the model gets z, unless one has it already."""
        keys, has_z = projected(survey, self.config), bool(holders(survey.model))
        return {
            name: self._child(name, module, keys[name], not has_z and index == 0)
            for index, (name, module) in enumerate(fresh.items())
        }

    def _child(self, name: str, module: nn.Module, keys: Keys, holds_z: bool) -> Subspace:
        config = self.config
        # A parameter that is tied to one of an earlier module has the factor of that module.
        has_scale = config.structure and any(row_name == join(name, key) for key, row_name in keys.items())
        seeds = {key: seed_of(config.seed, row_name, self.key) for key, row_name in keys.items()}
        device = parameter_of(module, next(iter(keys))).device
        return Subspace(config.projection, seeds, config.dimension if holds_z else None, has_scale, device)

    @override
    def connect(self, survey: Survey) -> None:
        connect(survey.model, projected(survey, self.config), self.config.seed)

    @override
    def is_adapted(self, model: nn.Module) -> bool:
        return any(True for _ in subspaces(model))

    @override
    def remove(self, model: nn.Module) -> None:
        def change(journal: Journal) -> None:
            if self.is_merged(model):
                self._unmerge(model, journal)
            remove(model, journal)

        all_or_nothing(model, change)

    @override
    def describe(self, model: nn.Module, save: str = "adapter") -> str:
        layers, moved = list(subspaces(model)), sum(holder.rows for holder in holders(model))
        first = next(name for name, _, child in layers if child.z is not None)
        what = "z and a factor of each module train" if self.config.structure else "z trains"
        return (
            f"{counted(moved, 'parameter')} of {counted(len(layers), 'module')} move in a subspace of "
            f"{counted(self.config.dimension, 'dimension')}: {what}, `{join(first, 'subspace.z')}`\n"
            f"{rest_trained(model)}"
        )

    # What trains.

    @override
    def adapted_weights(self, model: nn.Module) -> dict[int, tuple[str, nn.Parameter]]:
        """An optimizer trains z in the group of the first parameter, and each factor in that of its module."""
        return {
            id(parameter): (join(name, key), parameter_of(module, key))
            for name, module, child in subspaces(model)
            for key in list(child.seeds)[:1]
            for parameter in child.parameters()
        }

    @override
    def as_found(self, model: nn.Module) -> AbstractContextManager[None]:
        """A projected parameter is itself here: the user's code may look for it, or give it to an optimizer."""

        def change(undo: Undo) -> None:
            undo.append(partial(self.freeze, model))
            unfreeze(model)
            for holder in holders(model):
                undo.append(partial(setattr, holder, "enabled", holder.enabled))
                holder.enabled = False

        return Restoring(change)

    @override
    def watched(self, model: nn.Module) -> dict[str, Watched]:
        """Every child, as its parameters are read one by one; all of them give a gradient to one z."""
        return {
            name: Watched(child, child.holder.z, shared=True)
            for name, _, child in subspaces(model)
            if child.holder.z is not None
        }

    # The end of a run.

    @override
    def is_merged(self, model: nn.Module) -> bool:
        return any(True for _ in merged_modules(model))

    @override
    def never_merges(self, model: nn.Module) -> str | None:
        return None

    @override
    def merge(self, model: nn.Module, device: torch.device | None = None, like: Any = None) -> dict[str, float]:
        def change(journal: Journal) -> dict[str, float]:
            lost = merge(model, journal, device)
            for module, _ in adapted_as_a_whole(model):
                strip(module)
            return lost

        reshard(model)
        return all_or_nothing(model, change)

    @override
    def unmerge(self, model: nn.Module, device: torch.device | None = None) -> None:
        reshard(model)
        all_or_nothing(model, lambda journal: self._unmerge(model, journal))

    def _unmerge(self, model: nn.Module, journal: Journal) -> None:
        unmerge(model, journal)
        for module, configs in adapted_as_a_whole(model):
            equip(module, *configs)

    @override
    def merged_values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return merged_values(model)
