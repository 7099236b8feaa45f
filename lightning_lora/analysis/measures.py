"""Norms of each update and of the weight that it adapts, and their quotients for one layer or for many.

``|U^T W V|_F``, with the singular directions U and V of delta, takes ``W V``, which costs as much as r tokens in the
layer's forward. Everything else is of r x r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.analysis.decomposition import Core, core_of, grams
from lightning_lora.analysis.updates import Update, frozen_matrices, updates_of

ROWS = 4096  # of a weight in half precision that are cast for one product


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
    return float(torch.cat([measure.stable_rank.flatten() for measure in measures]).nanmean())


def _quotient(norms: list[tuple[Tensor, Tensor]]) -> float:
    first, second = (
        float(torch.linalg.vector_norm(torch.cat([norm.flatten() for norm in side])))
        for side in zip(*norms, strict=True)
    )
    return first / second if second else math.nan


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
    cores = _cores(updates)
    projected: dict[str, Tensor] = {}
    for update, matrix in frozen_matrices(model, updates):
        projected[update.name] = _projected(update, matrix, cores[update.name])
        if update.name not in weight_norms:
            weight_norms[update.name] = _norms(matrix).cpu()
    projected = _to_cpu(projected)
    return {name: _measure(core, weight_norms[name], projected[name]) for name, core in cores.items()}


def _measure(core: Core, weight: Tensor, projected: Tensor) -> Measure:
    delta, largest, directions = torch.linalg.vector_norm(core.S, dim=-1), core.S[:, 0], core.directions()
    return Measure(*(each.view(weight.shape) for each in (delta, largest, weight, projected, directions)))


def _cores(updates: list[Update]) -> dict[str, Core]:
    """The decomposition of each update, all of them in one call; the small matrices lie on the device of A."""
    r = max(update.pair.r for update in updates)
    stacked = [grams(update.factors(), r) for update in updates]
    core, device = core_of(stacked), stacked[0].device
    sizes = [each.shape[1] for each in stacked]
    sides = (torch.split(side.to(device), sizes) for side in core[1:])
    split = zip(torch.split(core.S, sizes), *sides, strict=True)
    return {update.name: Core(*parts) for update, parts in zip(updates, split, strict=True)}


def _projected(update: Update, matrix: Tensor, core: Core) -> Tensor:
    """``|U^T W V|_F`` of each matrix, in fp64 on the device of W."""
    B, A = update.factors()
    r, dtype = B.shape[-1], torch.promote_types(matrix.dtype, torch.float32)
    left, right = (side[:, :r, :r].reshape(*B.shape[:-2], r, r).to(B.device) for side in (core.left, core.right))
    U, V = (B @ left).to(matrix.device), (A.mT @ right).to(matrix.device, dtype)
    with torch.autocast(matrix.device.type, enabled=False):
        product = torch.cat([rows.to(dtype) @ V for rows in _blocks(matrix)], -2)
    return _norms(U.mT @ product.double())


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows of a matrix in half precision, so that never all of it is cast at the same time."""
    return torch.split(matrix, ROWS, -2) if matrix.element_size() < 4 else (matrix,)


def _norms(matrix: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, summed in fp64."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
    return norms


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of all tensors, each flat and on the CPU, by one copy from each device."""
    joined: dict[torch.device, Tensor] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        joined[device] = torch.cat([t.flatten() for t in tensors.values() if t.device == device]).cpu()
    result = {}
    for key, tensor in tensors.items():
        result[key], joined[tensor.device] = joined[tensor.device].tensor_split([tensor.numel()])
    return result
