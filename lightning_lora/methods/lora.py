"""LoRA as a method of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig, MethodConfig, check_compute
from lightning_lora.distributed.sharded import local_shard
from lightning_lora.layers.base import adapted_layers, disable_adapters, has_adapter, is_adapted, parameter_of
from lightning_lora.layers.restoring import Restoring, Undo
from lightning_lora.methods.base import Watched
from lightning_lora.methods.recorded import RecordedMethod
from lightning_lora.methods.several import check_all_named, check_kept, check_names, drop_adapters, why_not_all
from lightning_lora.model.adapter_loading import mark_merged
from lightning_lora.model.apply import checked_targets, names_of
from lightning_lora.model.copies import targets_of
from lightning_lora.model.freeze import unfreeze
from lightning_lora.model.initial_values import remember
from lightning_lora.model.inject import inject_each
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.loading import load_lora_state_dict
from lightning_lora.model.merge import merge_in, unmerge_in
from lightning_lora.model.mergeable import quantized_layers, unwritable
from lightning_lora.model.merged_values import merged_values, merged_weights, with_merged_weights
from lightning_lora.model.quantized.merge import MergeBase, merge_base_of, why_not_plain
from lightning_lora.model.record import configs_of, is_merged, merged_layers
from lightning_lora.model.report.random_heads import random_heads, warning_of
from lightning_lora.model.report.summary import describe
from lightning_lora.model.same_config import check_same, difference_by_name
from lightning_lora.model.several.strengths import set_strengths
from lightning_lora.model.state import (
    lora_parameters,
    lora_state_dict,
    parameters_of,
)
from lightning_lora.model.twins import Agree, own_answer
from lightning_lora.names import join
from lightning_lora.ops.workspace import Workspace
from lightning_lora.targets.survey import Survey

CALLS = ("forward", "add_to_weight", "operands", "note_read")  # of which a forward pass calls one of a pair


class LoRAMethod(RecordedMethod):
    """``W0 x + scale * B A x`` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        config: what to adapt and how.
        compute: the side of the equation, as of :func:`lightning_lora.apply_lora`.
        keep: adapters that the model has already and that do not train, with the strength with which they act.
        factors: of the updates that a merge adds, by adapter; ``None`` for what acts, if one adapter trains.
        into: what adapters on a quantized base are merged into; ``None`` merges none of them.

    Example:
        >>> method, model = LoRAMethod(LoRAConfig(r=2, targets="all")), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> method.complete(model)
        ['0', '1']
        >>> [name for name, _ in method.trained_parameters(model)]
        ['0.lora.default.A', '0.lora.default.B', '1.lora.default.A', '1.lora.default.B']
        >>> method.remove(model)
        >>> method.present(model) is None
        True
    """

    key: ClassVar[str] = "lora"
    config: LoRAConfig

    def __init__(
        self,
        config: LoRAConfig,
        compute: str = "auto",
        keep: Mapping[str, float] | None = None,
        factors: Mapping[str, float] | None = None,
        into: MergeBase | None = None,
    ) -> None:
        super().__init__(config)
        check_compute(compute, config)
        self.compute, self.keep = compute, dict(keep or {})
        self.names, self.factors, self.into = [each.name for each in config.each()], factors, into
        check_names(self.names, self.keep, factors or {})

    @override
    def difference(self, other: MethodConfig) -> str | None:
        if not isinstance(other, LoRAConfig):
            return f"a {type(other).__name__} instead of a LoRAConfig"
        return difference_by_name(self.config, other)

    @override
    def check_same(self, model: nn.Module) -> None:
        for config in self.config.each():
            check_same(model, config)
        check_all_named(model, {*self.names, *self.keep})

    @override
    def is_adapted(self, model: nn.Module) -> bool:
        return is_adapted(model)

    @override
    def adapt(self, model: nn.Module, agree: Agree = own_answer) -> None:
        def change(journal: Journal) -> None:
            survey = Survey(model)
            wanted = [(targets_of(survey, config), config) for config in self.config.each()]
            inject_each(wanted, agree, self.compute, self.keep)
            self._set_strengths(model)

        all_or_nothing(model, change)

    @override
    def complete(self, model: nn.Module, agree: Agree = own_answer) -> list[str]:
        return all_or_nothing(model, lambda journal: self._complete(model, agree))

    def _complete(self, model: nn.Module, agree: Agree) -> list[str]:
        survey = Survey(model)
        check_kept(model, self.keep, self.names)
        wanted = checked_targets(survey, self.config)
        inject_each(wanted, agree, self.compute, self.keep)
        self._set_strengths(model)
        remember(survey)
        return names_of(wanted)

    def _set_strengths(self, model: nn.Module) -> None:
        set_strengths(model, {**dict.fromkeys(self.names, 1.0), **self.keep})

    @override
    def present(self, model: nn.Module) -> MethodConfig | None:
        """The configuration of the first adapter of this run that ``model`` has; kept ones are no part of it."""
        present = configs_of(model)
        return next((present[name] for name in self.names if name in present), None)

    @override
    def drop(self, model: nn.Module) -> None:
        if configs_of(model).keys() <= set(self.names):
            super().drop(model)
        else:
            drop_adapters(model, self.names)

    @override
    def meant(self, model: nn.Module) -> set[int]:
        survey = Survey(model)
        return {id(site.module) for each in self.config.each() for site in targets_of(survey, each).sites}

    @override
    def describe(self, model: nn.Module, save: str = "adapter") -> str:
        return describe(model, save)

    @override
    def warnings(self, model: nn.Module) -> list[str]:
        heads = random_heads(model)
        return [warning_of(heads)] if heads else []

    @override
    def added_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return lora_parameters(model)

    def name_of_parameters(self, model: nn.Module) -> dict[int, str]:
        """The name of the adapter that each parameter of those which train belongs to, by ``id``."""
        return {key: name for name in self.names for key in parameters_of(model, name)}

    @override
    def adapted_weights(self, model: nn.Module) -> dict[int, tuple[str, nn.Parameter]]:
        return {
            id(parameter): (join(name, adapter.part.key), parameter_of(layer, adapter.part.key))
            for name, layer in adapted_layers(model)
            for adapter in layer.lora.all_pairs()
            for parameter in adapter.parameters()
        }

    @override
    def as_found(self, model: nn.Module) -> AbstractContextManager[None]:
        def change(undo: Undo) -> None:
            undo.append(partial(self.freeze, model))
            unfreeze(model)
            disable_adapters(model, undo)  # a parameter that is adapted where it is read is itself here

        return Restoring(change)

    @override
    def is_untrained(self, model: nn.Module) -> bool:
        """Whether every B of what trains is zero: a B on the meta device is."""
        own = self.name_of_parameters(model)
        pairs = [(name, p) for name, p in lora_parameters(model) if id(p) in own]
        every_B = [local_shard(p) for name, p in pairs if name.endswith(".B") and not p.is_meta]
        return not any(bool(B.any()) for B in every_B)

    @override
    def watched(self, model: nn.Module) -> dict[str, Watched]:
        several = len(self.names) > 1
        watched: dict[str, Watched] = {}
        for name, layer in adapted_layers(model):
            for adapter in (each for each in self.names if has_adapter(layer, each)):
                for pair in layer.lora.pairs_of(adapter):
                    matrix = join(name, pair.part.name) if pair.part.name else name
                    weight = "" if pair.part.read else join(name, pair.part.key)  # no advice to name it once more
                    watched[f"{matrix} ({adapter})" if several else matrix] = Watched(
                        pair, pair.B, CALLS, weight, adapter=adapter if several else ""
                    )
        return watched

    @override
    def copies(self, model: nn.Module) -> dict[str, str]:
        """Copies share the seed of one of them, see :mod:`lightning_lora.model.twins`."""
        originals: dict[int, str] = {}
        seeds = [(name, pair.seed) for name, layer in adapted_layers(model) for pair in layer.lora.all_pairs()]
        pairs = ((name, originals.setdefault(seed, name)) for name, seed in seeds)
        return {name: original for name, original in pairs if name != original}

    @override
    def state(self, model: nn.Module) -> dict[str, Any]:
        return lora_state_dict(model)

    @override
    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        load_lora_state_dict(model, state)

    @override
    def is_merged(self, model: nn.Module) -> bool:
        return is_merged(model)

    @override
    def never_merges(self, model: nn.Module) -> str | None:
        if self.into is not None or not quantized_layers(model):
            return why_not_all(self.names) if len(self.names) > 1 and self.factors is None else None
        ways = why_not_plain(model) or (
            "dequantize=True merges into the dequantized weights, merge_base=PATH into the weights in full precision "
            "that were quantized."
        )
        return (
            "Quantized weights cannot hold the sum, so nothing is merged: the module keeps its adapters, and the "
            f"checkpoints hold them. {ways}"
        )

    @override
    def cannot_write(self, model: nn.Module) -> str | None:
        return unwritable(model)

    @override
    def merged_as(self, model: nn.Module) -> Any:
        """The factors of the adapters that are merged, and what a quantized base was replaced by."""
        merged = [merged for _, _, merged in merged_layers(model)]
        factors = {name: factor for each in merged for name, factor in each.factors.items()}
        return (factors, merge_base_of(model)) if factors else None

    @override
    def merge(self, model: nn.Module, device: torch.device | None = None, like: Any = None) -> dict[str, float]:
        factors, into = (self.factors, self.into) if like is None else like
        return merge_in(model, Workspace(device), weights=factors, into=into)

    @override
    def unmerge(self, model: nn.Module, device: torch.device | None = None) -> None:
        unmerge_in(model, Workspace(device))

    @override
    def merged_values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return merged_values(model, self.factors, self.into)

    @override
    def merged_state(
        self, model: nn.Module, state: Mapping[str, Any], adapter: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Any]:
        merged = with_merged_weights(model, state, dict(merged_weights(model, adapter, self.factors)), names)
        mark_merged(merged, adapter)
        return merged
