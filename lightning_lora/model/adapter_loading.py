"""Adapter state dicts load by a module's own ``load_state_dict``, whether its adapters are live or merged.

Many libraries restore the best checkpoint by ``module.load_state_dict(torch.load(path)["state_dict"])`` after ``fit``.
The file of a LoRA run holds no frozen parameter, and torch alone would refuse it. A merged state dict, or one of the
module with its live adapters, holds frozen parameters too: then only the adapters are loaded, and the base stays as it
is, so that no update is added twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import reshard
from lightning_lora.layers.adapted import adapted_modules
from lightning_lora.layers.base import LoRALayer, adapted_layers, is_adapted
from lightning_lora.model.file_values import agree, is_whole
from lightning_lora.model.journal import Journal, all_or_nothing
from lightning_lora.model.loading import check_state, load_trained_state
from lightning_lora.model.merge import merge_all, unmerge_all
from lightning_lora.model.mergeable import quantized_layers
from lightning_lora.model.merged_values import merged_weights
from lightning_lora.model.quantized.merge import merge_base_of, plain_weights
from lightning_lora.model.record import config_of, is_merged, merged_children, merged_layers, record_of, records
from lightning_lora.model.state import (
    added_parameters,
    clean_state,
    frozen_names,
    needed_names,
    own_state,
)
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.workspace import Workspace
from lightning_lora.targets.survey import Survey, survey_of

MARK = "lightning_lora"  # in the metadata that torch keeps with a state dict, among that of the module itself


def mark_merged(state: Any, adapter: Mapping[str, Any]) -> None:
    """Record in ``state``, the state dict of a merged model, the adapters that are merged in it.

    ``torch.save`` keeps the mark. A module without adapters loads the state dict as if there were none.
    """
    state._metadata.setdefault("", {})[MARK] = dict(adapter)


class AdapterStateDict:
    """A ``load_state_dict`` pre-hook: it loads the adapters of a state dict, and gives torch the module's own tensors.

    Any other state dict is left to torch. torch does not tell a hook the argument ``strict``, so an adapter state dict
    must fit exactly under ``strict=False`` too.
    """

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: object
    ) -> None:
        """If the entries of ``module`` in ``state_dict`` have adapters, load all of these or none."""
        # Below the module that was adapted, only the one whose `load_state_dict` was called knows the whole file.
        if (names.clean(prefix) and record_of(module).config is None) or config_of(module) is None:
            return
        keys = {names.clean(key[len(prefix) :]): key for key in state_dict if key.startswith(prefix)}
        done = load_adapters(module, {name: state_dict[key] for name, key in keys.items()}, metadata.get(MARK))
        for name in done & keys.keys():
            del state_dict[keys[name]]
        if done:
            own = own_state(module).items()  # which torch copies onto itself
            state_dict.update({prefix + key: value for key, value in own if names.clean(key) in done})


def load_adapters(module: nn.Module, state: Mapping[str, Any], marked: Mapping[str, Any] | None) -> set[str]:
    """Load the adapters of ``state``, if it has any, into ``module``, which has adapters too.

    Args:
        module: it stays merged if it is.
        state: under clean names.
        marked: the adapters that are merged in ``state``, where that is known.

    Returns:
        The names of the entries that torch must not load any more.

    Raises:
        ValueError: if the adapters do not fit, or their base is another one; then nothing was changed.
    """
    if marked is not None:
        _adopt(module, marked, state, are_merged=True)
    elif is_adapter_state(module, state):
        if not state.keys() & frozen_names(module):
            all_or_nothing(module, lambda journal: _load(module, state, journal))
            return clean_state(module).keys() | state.keys()
        frozen = frozen_names(module)
        marked = {name: value for name, value in state.items() if name not in frozen}
        _adopt(module, marked, state, are_merged=False)
    else:
        return _own_merged_weights(module, state) if is_adapted(module) else set()
    return state.keys() & clean_state(module).keys() | marked.keys() | set(needed_names(module))


def _adopt(module: nn.Module, adapter: Mapping[str, Any], state: Mapping[str, Any], are_merged: bool) -> None:
    """Load ``adapter``, and see that the rest of ``state`` is the base of ``module``, with it merged or not."""

    def check_base() -> None:
        own, frozen = clean_state(module), frozen_names(module)
        sums = merged_weights(module, {}) if are_merged and all(map(is_whole, own.values())) else ()
        expected = _with_sums({name: value for name, value in own.items() if name in frozen}, sums)
        wrong = next((name for name, value in expected if not agree(state.get(name, value), value)), None)
        if wrong is not None:
            raise ValueError(
                f"`{wrong}` has other values in the state dict than in this module, so its adapters were trained on "
                "another base. To load it as it is call `remove_lora(module)` first."
            )

    all_or_nothing(module, lambda journal: _load(module, adapter, journal, check_base))


def _load(
    module: nn.Module, adapter: Mapping[str, Any], journal: Journal, check: Callable[[], None] = lambda: None
) -> None:
    """Load into live or merged adapters; those that were merged are merged again, after ``check``."""
    check_state(module, adapter)
    reshard(module)
    merged, workspace, others = list(merged_layers(module)), Workspace(), merged_children(module)
    into = merge_base_of(module)
    unmerge_all(merged, journal, workspace)
    for _, _, other in others[:1]:  # it acts on the whole model
        other.unmerge(module, journal)
    load_trained_state(module, adapter, journal)
    check()
    for _, _, other in others[:1]:
        other.merge(module, journal)
    plain = None if into is None else plain_weights(module, into)
    layers = [(name, layer) for name, layer, _ in merged if isinstance(layer, LoRALayer)]
    merge_all(layers, journal, workspace, plain=plain)


def _with_sums(base: Mapping[str, Any], sums: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Any]]:
    """The entries of ``base``, of which ``sums`` replace some; one sum is in memory at a time."""
    summed = set()
    for name, value in sums:
        summed.add(name)
        yield name, value
    yield from ((name, value) for name, value in base.items() if name not in summed)


def _own_merged_weights(module: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """The adapted weights of ``module``, if all that ``state`` has of them have the live adapters merged in already.

    A mark is lost where a state dict is copied entry by entry. Other values are those of a new base.
    """
    base = clean_state(module)
    weights = [names.join(name, key) for name, layer in adapted_layers(module) for key in layer.lora.by_weight()]
    if not all(name in state and is_whole(base[name]) for name in weights) or quantized_layers(module):
        return set()
    if all(_is_same(state[name], base[name]) for name in weights):
        return set()
    if all(_is_same(state[name], value) for name, value in merged_weights(module, {})):
        return set(weights)
    others = frozen_names(module) & state.keys() - set(weights)
    if others and all(_is_same(state[name], base[name]) for name in others):
        warnings.warn(
            f"The state dict that was loaded differs from the base in adapted weights only (as in `{weights[0]}`). If "
            "adapters are merged in it, they act twice now: load `checkpoint['state_dict']` as it is, without a copy.",
            stacklevel=2,
        )
    return set()


def _is_same(stored: Any, own: Any) -> bool:
    """Whether ``stored``, cast to the dtype of ``own``, has its bits: a bf16 update can be a mere rounding."""
    return isinstance(stored, Tensor) and isinstance(own, Tensor) and same_bits(stored.to(own.dtype), own)


def is_adapter_state(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` has entries of adapters, of ``model`` or of another one, that torch cannot load by itself.

    Into a model with live adapters torch loads a state dict that also holds frozen parameters.
    """
    present, added = clean_state(model), {name for name, _ in added_parameters(model)}
    if not added:
        return state.keys() >= set(needed_names(model)) and not frozen_names(model) & state.keys()
    keys = {module.method_key for _, module in adapted_modules(model)}
    keys |= {merged.key for _, _, merged in merged_children(model)}
    keys = keys or {"lora"}  # without one it is merged
    named = (key for key in state if not keys.isdisjoint(key.split(".")))
    if not any(key in added or key not in present for key in named):
        return False
    return is_merged(model) or not frozen_names(model) & state.keys()


def accept_adapters(model: nn.Module | Survey) -> None:
    """Let adapter state dicts load into ``model`` and into every part of it that holds an adapted layer.

    The hooks stay when the adapters are merged, and are removed with the records of their modules.
    """
    survey = survey_of(model)
    inside = [module for _, module, record in records(survey) if record.adapted_by]
    for module in survey.around([*survey.adapted(), *inside]).values():
        record = record_of(module)
        if record.load_hook is None:
            record.load_hook = module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                AdapterStateDict()
            )
