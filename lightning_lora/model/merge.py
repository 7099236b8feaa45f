"""The verbs that merge a model's adapters, ``W = W0 + scale * B A`` in place, and unmerge them bit for bit."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from torch import nn

from lightning_lora.arguments import check_flag, check_merge_base, check_number
from lightning_lora.distributed.sharded import reshard
from lightning_lora.layers.base import LoRALayer, adapted_layers, is_adapted
from lightning_lora.layers.quantized.formats import is_quantized, quantized_modules
from lightning_lora.model.freeze import unfreeze
from lightning_lora.model.hooks import equip, strip
from lightning_lora.model.journal import Journal, all_or_nothing, complete_undo
from lightning_lora.model.merge_layer import merge_layer, unmerge_layer
from lightning_lora.model.mergeable import check_has_quantized, check_mergeable, warn_of_shared
from lightning_lora.model.quantized.base_file import differences_elsewhere, open_base
from lightning_lora.model.quantized.flags import put_flags_back, take_flags
from lightning_lora.model.quantized.merge import (
    MergeBase,
    PlainWeights,
    make_others_plain,
    merge_base_of,
    merge_quantized_layer,
    pack_others_again,
    plain_dtype,
    plain_weights,
)
from lightning_lora.model.record import Merged, forget, holders, is_merged, merged_layers, record_of
from lightning_lora.model.several.one_adapter import check_name
from lightning_lora.model.several.strengths import strengths_of
from lightning_lora.names import join
from lightning_lora.ops.workspace import Workspace


def merge_lora(
    model: nn.Module,
    weights: Mapping[str, float] | None = None,
    *misplaced: NoReturn,
    undo: bool = True,
    dequantize: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Add adapters to the weights that they adapt, in place: afterwards ``model`` is a plain model.

    The sum is computed in fp32 (fp64 for an fp64 base) and rounded once. Afterwards classes, keys and
    ``requires_grad`` are the original ones. A record stays on the layers, from which :func:`unmerge_lora` restores the
    base bit for bit.

    Args:
        model: a model with adapters; one that is merged already with the same ``weights`` stays as it is.
        weights: the factor of each adapter's update by name, such as ``{"fr": 1.0, "de": 0.5}``. Adapters that it does
            not name rest in the record, and :func:`unmerge_lora` brings them back too. ``None`` merges what acts in
            calls without :func:`use_adapters`: all, unless some rest, as after :func:`combine_adapters`.
        misplaced: nothing; it catches what is not given by name.
        undo: keep that record (the default). ``False`` deletes it: the merged weights are the base from then on.
        dequantize: for a quantized base, whose few bits cannot hold the sum: merge into the dequantized weights. Every
            quantized layer becomes a plain linear layer, in the dtype of most of the other parameters. The merged model
            computes what the adapters were trained to compute.
        base: for a quantized base: merge into the weights in full precision in this file or directory, in the same way.
            It must be the model that was quantized. A safetensors file, a directory with one, with shards or with
            ``pytorch_model.bin``, or a state dict or a checkpoint that ``torch.save`` wrote. The adapters were trained
            on other weights, so measure what the merged model loses or gains.

    Returns:
        For each merged layer the share of delta's norm that rounding to the weight's dtype lost: about 1e-4 or less in
        fp32, much more in half precision when delta is small.

    Raises:
        ValueError: if ``model`` has no adapters, none of a name in ``weights``, or none that acts; if a factor is not
            finite; if its weights have no values (the meta device), are in pieces (FSDP1, ZeRO 3), or tied and sharded;
            if they are quantized and neither ``dequantize`` nor ``base`` is given, or both are, or they are not and one
            is; or if ``base`` is another model.
        FileNotFoundError: if there is nothing at ``base``.
        TypeError: if ``undo`` or ``dequantize`` is no bool, or is given by position.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: no added inference latency.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> merge_lora(model)
        {'': 0.0}
    """
    _check_arguments(weights, *misplaced)
    check_flag("undo", undo)
    check_merge_base("base", base, dequantize)
    _check_something_acts(model, weights)
    into = MergeBase(None if base is None else os.fspath(base)) if dequantize or base is not None else None
    if into is not None:
        check_has_quantized(model, "dequantize=True" if base is None else f"base={str(base)!r}")
    differences = None
    if into is not None and into.path is not None and quantized_modules(model):
        file = open_base(into.path, model)
        into, differences = replace(into, file=file), differences_elsewhere(file, model, plain_dtype(model))
    lost = merge_in(model, Workspace(), undo, weights, into)
    if differences is not None:
        warnings.warn(differences, stacklevel=2)
    return lost


def merge_in(
    model: nn.Module,
    workspace: Workspace,
    undo: bool = True,
    weights: Mapping[str, float] | None = None,
    into: MergeBase | None = None,
) -> dict[str, float]:
    """As :func:`merge_lora`; the sums are computed in ``workspace``, and have the same bits on every device."""
    complete_undo(model)
    reshard(model)
    if not is_adapted(model) and not is_merged(model):
        raise ValueError("The model has no adapters to merge: call `apply_lora`, or load an adapter, first.")
    for name in weights or ():
        check_name(model, name, "weights")

    def change(journal: Journal) -> dict[str, float]:
        other_weights = weights is not None and _is_merged_otherwise(model, weights)
        if other_weights or _is_merged_into_another(model, into):
            unmerge(model, journal, workspace)
        layers = list(adapted_layers(model))
        check_mergeable(model, layers, into)
        warn_of_shared(layers)
        return _merge(model, layers, undo, journal, workspace, weights, into)

    return all_or_nothing(model, change)


def _check_something_acts(model: nn.Module, weights: Mapping[str, float] | None) -> None:
    strengths = {} if is_merged(model) else strengths_of(model)
    if weights is None and strengths and not any(strengths.values()):
        each = ", ".join(f"`{name}`" for name in strengths)
        raise ValueError(
            f"Every adapter of the model rests ({each}), so there is nothing to merge. Name what to merge: "
            f"merge_lora(model, {{{next(iter(strengths))!r}: 1.0}})."
        )


def _is_merged_otherwise(model: nn.Module, weights: Mapping[str, float]) -> bool:
    """Whether adapters are merged with other factors than ``weights``."""
    present = [(merged.factors, merged.adapters) for _, _, merged in merged_layers(model)]
    return any(factors.get(name, 0) != weights.get(name, 0) for factors, adapters in present for name in adapters)


def _is_merged_into_another(model: nn.Module, into: MergeBase | None) -> bool:
    """Whether adapters are merged into another base in full precision than ``into``."""
    present = merge_base_of(model)
    return into is not None and present is not None and present.path != into.path


def _check_arguments(weights: object, *misplaced: object) -> None:
    flags = [weights, *misplaced] if isinstance(weights, bool) else misplaced
    if flags:
        raise TypeError(f"`undo` must be given by name, but got {flags[0]!r} by position. Write `undo={flags[0]!r}`.")
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(
            "`weights` must be a dict from names of adapters to numbers, such as {'fr': 1.0, 'de': 0.5}, but got "
            f"{weights!r}."
        )
    for name, factor in (weights or {}).items():
        check_number(f"weights[{name!r}]", factor)
        if not math.isfinite(factor):
            raise ValueError(f"`weights[{name!r}]` must be finite, but got {factor}.")


def _merge(
    model: nn.Module,
    layers: list[tuple[str, LoRALayer]],
    undo: bool,
    journal: Journal,
    workspace: Workspace,
    weights: Mapping[str, float] | None,
    into: MergeBase | None,
) -> dict[str, float]:
    plain = None if into is None else plain_weights(model, into)
    lost = merge_all(layers, journal, workspace, weights, plain)
    if plain is not None:
        make_others_plain(model, plain, workspace)
        take_flags(model, journal)
    lost = {name: lost[name] for name, layer in layers if record_of(layer).merged.weights}  # type: ignore[union-attr]
    for holder, _ in holders(model):  # none where `model` is a part of an adapted model: it stays frozen with that
        strip(holder)
    if not undo:
        unfreeze(model)
        forget(model)
    return lost


def unmerge_lora(model: nn.Module) -> None:
    """Subtract merged adapters: the base's weights are restored bit for bit, and the adapters act again.

    Raises:
        ValueError: if ``model`` was never merged, or a merged weight was changed since; then nothing is changed.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> _ = merge_lora(model)
        >>> unmerge_lora(model)
        >>> torch.equal(model.weight, before)
        True
    """
    unmerge_in(model, Workspace())


def unmerge_in(model: nn.Module, workspace: Workspace) -> None:
    """As :func:`unmerge_lora`; the differences are computed in ``workspace``."""
    complete_undo(model)
    reshard(model)
    if not is_merged(model) and not is_adapted(model):
        raise ValueError("The model has no merged adapters: it was never merged, or with `undo=False`.")
    all_or_nothing(model, lambda journal: unmerge(model, journal, workspace))


def unmerge(model: nn.Module, journal: Journal, workspace: Workspace) -> None:
    """Unmerge every layer of ``model``, and freeze it again, as a part of a larger change.

    Raises:
        ValueError: as :func:`unmerge_lora`.
    """
    put_flags_back(model, journal)
    unmerge_all(list(merged_layers(model)), journal, workspace)
    changed = pack_others_again(model, workspace)
    if changed is not None:
        raise ValueError(_changed_since(changed))
    for holder, configs in holders(model):
        equip(holder, *configs)


def unmerge_all(merged: list[tuple[str, nn.Module, Merged]], journal: Journal, workspace: Workspace) -> None:
    """Unmerge these layers.

    Raises:
        ValueError: if a merged weight was changed since.
    """
    with workspace:
        for name, module, record in merged:
            changed = unmerge_layer(module, record, journal, workspace)
            if changed is not None:
                raise ValueError(_changed_since(join(name, changed)))


def _changed_since(name: str) -> str:
    return (
        f"`{name}` is not what the merge left there: it was changed, cast or loaded since, or its merge record was, so "
        "the base cannot be restored. Nothing was changed. To go on from these weights call `merge_lora(model, "
        "undo=False)`."
    )


def merge_all(
    layers: list[tuple[str, LoRALayer]],
    journal: Journal,
    workspace: Workspace,
    weights: Mapping[str, float] | None = None,
    plain: PlainWeights | None = None,
) -> dict[str, float]:
    """Merge these layers, quantized ones into ``plain``; for each the share of delta's norm that rounding lost."""

    def merge(name: str, layer: LoRALayer) -> float:
        if plain is not None and is_quantized(layer):
            return merge_quantized_layer(name, layer, plain, workspace, weights)
        return merge_layer(layer, journal, workspace, weights)

    with workspace:
        return {name: merge(name, layer) for name, layer in layers}
