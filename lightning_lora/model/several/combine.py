"""The verb that combines adapters of a model into a new one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.distributed.sharded import is_sharded, is_split
from lightning_lora.layers.adapter import Adapter, seed_of
from lightning_lora.model.apply import checked_targets
from lightning_lora.model.inject import inject_each
from lightning_lora.model.journal import all_or_nothing, complete_undo
from lightning_lora.model.record import configs_of, is_merged, record_of
from lightning_lora.model.same_config import check_method
from lightning_lora.model.several.combined_config import combined_config
from lightning_lora.model.several.common_form import CommonMatrix, common_matrices
from lightning_lora.model.several.one_adapter import check_name
from lightning_lora.model.several.recipe import Recipe, checked_recipe
from lightning_lora.model.several.strengths import set_strengths
from lightning_lora.ops.combination import KINDS
from lightning_lora.ops.low_rank import DeltaFactors, LowRank
from lightning_lora.targets.survey import Survey


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    kind: str = "cat",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, float]:
    """Add the adapter ``name`` to ``model``, which combines the updates of others: all of it, or nothing.

    What is combined is delta, ``scale * B A``, whatever rank, alpha, ``rslora`` and targets each adapter has; where one
    has no pair it counts as zero. Afterwards ``name`` acts alone in calls without :func:`use_adapters`: the others rest
    until they are chosen, as otherwise their updates would be added twice. It is an adapter as any other, with a scale
    of 1: it can be saved, merged and trained. Trained biases and ``also_train`` modules are the same for all adapters
    and stay as they are.

    Args:
        model: the module that :func:`apply_lora` was called with, with live adapters.
        weights: the factor of each adapter's update by name, such as ``{"fr": 0.5, "de": 0.5}``; it may be negative.
        name: of the new adapter.
        kind: ``"cat"``: the weighted sum, exactly; its rank is the sum of the ranks. ``"svd"``: the nearest of rank
            ``r`` to that sum. ``"ties"``: in each matrix the largest elements of each update are kept; at each element
            the sign with the larger sum wins, and those that have it are averaged. ``"dare"``: random elements of each
            update are dropped and the others divided by ``density``, then they are added. Both give matrices of full
            rank, of which the nearest of rank ``r`` is taken: look at what that loses.
        r: rank of the new adapter, for every kind but ``"cat"``; ``None`` takes the largest of the combined ranks, in
            each matrix.
        density: for ``"ties"`` the share of elements that is kept, for ``"dare"`` the probability of keeping one.
        seed: of the elements that ``"dare"`` drops.

    Returns:
        For each layer the share of the norm of its update that a rank of ``r`` loses, 0 to 1; of several matrices in
        a layer the largest.

    Raises:
        ValueError: if an adapter is unknown, ``name`` is taken or no identifier, an argument is out of its range, or
            the adapters are merged or sharded, or their values are not there (the meta device) or not finite; then
            nothing is changed.
        TypeError: if an argument has the wrong type.

    Source: Yadav et al. 2023 (arXiv 2306.01708) for TIES, Yu et al. 2023 (arXiv 2311.03099) for DARE.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> for language in ("fr", "de"):
        ...     _ = apply_lora(model, LoRAConfig(r=1, targets="all", name=language))
        >>> combine_adapters(model, {"fr": 0.5, "de": 0.5}, "mix")
        {'': 0.0}
        >>> model.lora["mix"].A.shape
        torch.Size([2, 4])
    """
    recipe = checked_recipe(weights, kind, r, density, seed)
    complete_undo(model)
    _check_model(model, recipe.weights, name)
    return all_or_nothing(model, lambda _: _combine(model, recipe, name))


def _combine(model: nn.Module, recipe: Recipe, name: str) -> dict[str, float]:
    matrices = common_matrices(model, recipe.weights)
    _check_values(matrices)
    configs = configs_of(model)
    sources = [config for each in recipe.weights if isinstance(config := configs[each], LoRAConfig)]
    config = combined_config(model, sources, name, {matrix.name: recipe.rank(matrix) for matrix in matrices})
    inject_each(checked_targets(Survey(model), config), kept=record_of(model).kept)
    lost: dict[str, float] = {}
    for matrix in matrices:
        energy = _fill(matrix, recipe, name)
        lost[matrix.layer_name] = max(lost.get(matrix.layer_name, 0.0), math.sqrt(1 - energy))
    set_strengths(model, {other: 0.0 for other in configs_of(model) if other != name})
    return lost


@torch.no_grad()
def _fill(matrix: CommonMatrix, recipe: Recipe, name: str) -> float:
    """Write the combination into the new pair of one matrix; returns the smallest share of energy that it has."""
    (pair,) = (pair for pair in matrix.layer.lora.pairs_of(name) if pair.part == matrix.part)
    combined = list(_combined(matrix, recipe))
    if not matrix.part.stacked:
        _write(combined[0].A, combined[0].B, pair)
    else:
        _write(torch.stack([each.A for each in combined]), torch.stack([each.B for each in combined]), pair)
    return min((each.energy for each in combined), default=1.0)


def _combined(matrix: CommonMatrix, recipe: Recipe) -> Iterator[LowRank]:
    """The combination of a matrix, or of each one in a stack."""
    updates: list[DeltaFactors] = []
    for adapter in matrix.pairs:
        B, A = matrix.factors(adapter)
        updates.append((recipe.weights[adapter] * B, A))
    seeds = (seed_of(recipe.seed, matrix.name, adapter) for adapter in matrix.pairs)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    experts = zip(*(zip(B, A, strict=True) for B, A in updates), strict=True) if matrix.part.stacked else [updates]
    for each in experts:
        yield KINDS[recipe.kind](each, recipe.rank(matrix), recipe.density, generators)


def _write(A: torch.Tensor, B: torch.Tensor, pair: Adapter) -> None:
    """Write A and B. Rank that they do not use keeps its random A and zero B: with both zero it could never train."""
    unused = ~(A.any(-1) | B.any(-2))
    pair.A.copy_(torch.where(unused.unsqueeze(-1), pair.A.to(A.device), A))
    pair.B.copy_(B)
    if pair.padding_idx is not None:
        pair.A[:, pair.padding_idx] = 0  # a decomposition leaves 1e-16 there, and files hold zero


def _check_model(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    check_method(model, LoRAConfig(name=name))
    for each in weights:
        check_name(model, each, "weights")
    if name in configs_of(model):
        raise ValueError(
            f"`name` must be that of a new adapter, but the model has {name!r} already. Write another name, or take "
            f"that one off with `remove_lora(model, name={name!r})`."
        )
    if is_merged(model):
        raise ValueError("The adapters are merged into the model: call `unmerge_lora(model)` before they are combined.")
    elsewhere = [each for each in weights if each not in record_of(model).configs]
    if elsewhere:
        raise ValueError(
            f"`model` must be the module that `apply_lora` was called with, but a part of it, or a module around it, "
            f"was adapted by `{elsewhere[0]}`. Call `combine_adapters` with that."
        )


def _check_values(matrices: list[CommonMatrix]) -> None:
    for matrix in matrices:
        tensors = [tensor for pairs in matrix.pairs.values() for pair in pairs for tensor in pair.parameters()]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"The adapters of `{matrix.layer_name}` are on the meta device, without values to combine: load them "
                "first."
            )
        if any(is_sharded(tensor) or is_split(tensor) for tensor in tensors):
            raise ValueError(
                f"The adapters of `{matrix.layer_name}` are sharded over processes. Save them, load them into a model "
                "on one device, and combine them there."
            )
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ValueError(f"The adapters of `{matrix.layer_name}` hold NaN or infinity: the training diverged.")
