"""Norms of each update and of the weight that it adapts, and their quotients for one layer or for many.

``|U^T W V|_F``, with the singular directions U and V of delta, takes ``W V``, which costs as much as r tokens in the
layer's forward. Everything else is of r x r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.analysis.decomposition import Core, core_of
from lightning_lora.analysis.update_group import UpdateGroup, groups_of, norms
from lightning_lora.analysis.updates import frozen_matrices, updates_of


@dataclass(frozen=True)
class Measure:
    """The norms of one update; every tensor is a number, or of shape ``(experts,)`` for a stack of matrices.

    Args:
        delta: ``|delta|_F``.
        largest: ``|delta|_2``, its largest singular value.
        weight: ``|W|_F`` of the adapted part of the frozen weight.
        projected: ``|U^T W V|_F``, with the singular directions U and V of delta.
        directions: how many directions delta has: r, or fewer where singular values are negligible.
    """

    delta: Tensor
    largest: Tensor
    weight: Tensor
    projected: Tensor
    directions: Tensor

    @property
    def ratio(self) -> Tensor:
        """``|delta|_F / |W|_F``."""
        return self.delta / self.weight

    @property
    def stable_rank(self) -> Tensor:
        """``|delta|_F^2 / |delta|_2^2``, from 1 to r; NaN where delta is zero."""
        return (self.delta / self.largest).square()

    @property
    def amplification(self) -> Tensor:
        """``|delta|_F / |U^T W V|_F``; NaN where delta is zero."""
        return self.delta / self.projected


def ratio_of(measures: Iterable[Measure]) -> float:
    """``|delta|_F / |W|_F`` of all matrices together, as of one matrix that holds them."""
    return _quotient([(measure.delta, measure.weight) for measure in measures])


def amplification_of(measures: Iterable[Measure]) -> float:
    """``|delta|_F / |U^T W V|_F`` of all matrices together."""
    return _quotient([(measure.delta, measure.projected) for measure in measures])


def stable_rank_of(measures: Iterable[Measure]) -> float:
    """The mean of the stable ranks of all matrices; those whose delta is zero have none."""
    ranks = [rank for measure in measures for rank in measure.stable_rank.flatten().tolist() if not math.isnan(rank)]
    return math.fsum(ranks) / len(ranks) if ranks else math.nan


def _quotient(norms: list[tuple[Tensor, Tensor]]) -> float:
    first, second = (_norm_of_all(side) for side in zip(*norms, strict=True))
    return first / second if second else math.nan


def _norm_of_all(norms: Iterable[Tensor]) -> float:
    """The root of the sum of the squares; in Python, as a tensor operation takes longer than these few numbers."""
    return math.hypot(*(norm for tensor in norms for norm in tensor.flatten().tolist()))


@torch.no_grad()
def measure(
    model: nn.Module, name: str | None = None, weight_norms: MutableMapping[str, Tensor] | None = None
) -> dict[str, Measure]:
    """Measure the updates of one adapter of ``model``, by the names of the layers.

    The products with W are computed in fp32, or in fp64 for an fp64 weight; the rest in fp64. Every rank must call it
    where weights are sharded, and all get the same.

    Args:
        model: any module with adapters in it, live or merged.
        name: of the adapter; ``None`` is the only one.
        weight_norms: ``|W|_F`` by layer from an earlier call, which is not computed again; this call adds what is
            missing.

    Raises:
        ValueError: as :func:`~lightning_lora.analysis.updates.updates_of` and
            :func:`~lightning_lora.analysis.updates.frozen_matrices`.
    """
    weight_norms = {} if weight_norms is None else weight_norms
    updates = updates_of(model, name)
    groups = groups_of(updates)
    of_cores = _decompose(groups)
    group_of = {update.name: group for group in groups for update in group.updates}
    projected: dict[str, Tensor] = {}
    for update, matrix in frozen_matrices(model, updates):
        group = group_of[update.name]
        values = group.add(update, matrix)
        if values is not None:
            projected |= {each.name: value for each, value in zip(group.updates, values, strict=True)}
        if update.name not in weight_norms:
            weight_norms[update.name] = norms(matrix).cpu()
    projected = _to_cpu(projected)
    return {
        update.name: _measure(weight_norms[update.name], projected[update.name], of_cores[update.name])
        for update in updates
    }


def _measure(weight: Tensor, projected: Tensor, of_core: Sequence[Tensor]) -> Measure:
    delta, largest, directions = of_core
    return Measure(*(each.view(weight.shape) for each in (delta, largest, weight, projected, directions)))


def _decompose(groups: Sequence[UpdateGroup]) -> dict[str, Sequence[Tensor]]:
    """Give each group the cores of its updates, which are found in one call.

    Returns:
        By the name of the update ``|delta|_F``, ``|delta|_2`` and the number of directions of each of its matrices.
    """
    r = max(group.updates[0].pair.r for group in groups)
    stacked = [group.grams(r) for group in groups]
    core = core_of(stacked)
    of_core = (torch.linalg.vector_norm(core.S, dim=-1), core.S[:, 0], core.directions())
    sizes = [each.shape[1] for each in stacked]
    for group, *sides in zip(groups, *(torch.split(side, sizes) for side in core), strict=True):
        group.core = Core(*sides)
    members = [update.name for group in groups for update in group.updates]
    counts = [size // len(group.updates) for group, size in zip(groups, sizes, strict=True) for _ in group.updates]
    parts = zip(*(torch.split(each, counts) for each in of_core), strict=True)
    return dict(zip(members, parts, strict=True))


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of all tensors, each flat and on the CPU, by one copy from each device."""
    joined: dict[torch.device, Tensor] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        joined[device] = torch.cat([t.flatten() for t in tensors.values() if t.device == device]).cpu()
    result = {}
    for key, tensor in tensors.items():
        result[key], joined[tensor.device] = joined[tensor.device].tensor_split([tensor.numel()])
    return result
