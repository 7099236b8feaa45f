"""The merge of one layer: ``W = W0 + scale * B A`` in place, with what an exact unmerge needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_tensor, local_shard
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of, pop_adapters, set_adapters
from lightning_lora.layers.registry import adapted_class_for
from lightning_lora.model.journal import Journal
from lightning_lora.model.record import Merged, MergedWeight, record_of
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_sum import checksum


def merge_layer(layer: LoRALayer, journal: Journal) -> float:
    """Merge all adapters of ``layer``, and give it its plain class back.

    A parameter that other modules have too stays as it is: the layer gets one of its own for the sum.

    Returns:
        The share of delta's norm that rounding lost.
    """
    merged: dict[str, MergedWeight] = {}
    sums: list[exact.MergedMatrix] = []
    for key, adapters in layer.lora.by_weight().items():
        parameter = parameter_of(layer, key)
        shared = parameter if key in record_of(layer).shared else None
        if shared is not None:
            setattr(layer, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        merged[key], weight_sums = _merge_into(layer, key, adapters, journal)
        merged[key].shared = shared
        sums += weight_sums
    record_of(layer).merged = Merged(pop_adapters(layer), merged)
    size = math.hypot(*(each.size for each in sums))
    return math.hypot(*(each.lost * each.size for each in sums)) / size if size else 0.0


@torch.no_grad()
def _merge_into(
    layer: LoRALayer, key: str, adapters: list[Adapter], journal: Journal
) -> tuple[MergedWeight, list[exact.MergedMatrix]]:
    parameter = parameter_of(layer, key)
    weight = local_shard(parameter)
    merged, patches, sums = _sum(parameter, adapters, layer.lora_after_merge)
    record = MergedWeight(patches, checksum(merged), checksum(weight))
    journal.steps.append(MergedStep(parameter, adapters, record))
    weight.copy_(merged)
    return record, sums


@torch.no_grad()
def _sum(
    parameter: Tensor, adapters: list[Adapter], after_merge: Callable[[Tensor], bool]
) -> tuple[Tensor, list[exact.Patch], list[exact.MergedMatrix]]:
    """The sum for this rank's part of ``parameter``, and what turns it into the original again."""
    weight, matrices_of = local_shard(parameter), adapters[0].part.matrices
    originals, factors = matrices_of(weight), factors_of(adapters, parameter)
    sums = [exact.add_delta(*pair) for pair in zip(originals, factors, strict=True)]
    merged = _as_weight([each.merged for each in sums], weight)
    if after_merge(merged):
        for each, matrix, pairs in zip(sums, matrices_of(merged), factors, strict=True):
            each.roundtrip = exact.subtract_delta(matrix, pairs)
    patches = [exact.patch_for(matrix, each.roundtrip) for matrix, each in zip(originals, sums, strict=True)]
    return merged, patches, sums


@dataclass
class MergedStep:
    """The sum is written into ``parameter``; ``record`` is made before that, and gives the original back."""

    parameter: nn.Parameter
    adapters: list[Adapter]
    record: MergedWeight

    @torch.no_grad()
    def undo(self) -> None:
        """Write the original, whether the sum was written or not."""
        original = _restored(self.parameter, self.adapters, self.record)
        assert original is not None  # A, B and the weight are those of the merge
        local_shard(self.parameter).copy_(original)


@dataclass
class UnmergedStep:
    """The original is written into ``parameter``, which holds the sum until then."""

    parameter: nn.Parameter
    adapters: list[Adapter]
    record: MergedWeight
    after_merge: Callable[[Tensor], bool]

    @torch.no_grad()
    def undo(self) -> None:
        """Write the sum again, if the original was written."""
        if checksum(local_shard(self.parameter)) != self.record.checksum:
            local_shard(self.parameter).copy_(_sum(self.parameter, self.adapters, self.after_merge)[0])


def _as_weight(matrices: list[Tensor], weight: Tensor) -> Tensor:
    """The matrices as one tensor like ``weight``. This rank may hold none of a stack of experts."""
    if len(matrices) == 1:
        return matrices[0].view(weight.shape)
    return torch.stack(matrices).view(weight.shape) if matrices else weight.clone()


def factors_of(adapters: list[Adapter], weight: Tensor) -> list[exact.Factors]:
    """The factors of every adapter's delta, in fp32 or better, for each matrix in this rank's part of ``weight``."""
    dtype, device = torch.promote_types(weight.dtype, torch.float32), local_shard(weight).device
    by_adapter: list[list[tuple[Tensor, Tensor]]] = []
    for adapter in adapters:
        A, B = (full_tensor(matrix).detach().to(device, dtype) for matrix in (adapter.A, adapter.B))
        left, right = (
            side if side.dim() == 3 else side.unsqueeze(0)
            for side in adapter.part.factors(A, adapter.scale * B, weight)
        )
        experts, rows, columns = adapter.part.region(weight)
        pairs = zip(left[experts], right[experts], strict=True)
        by_adapter.append([(b[rows], a[:, columns]) for b, a in pairs])
    return [list(factors) for factors in zip(*by_adapter, strict=True)]


def unmerge_layer(module: nn.Module, record: Merged, journal: Journal) -> bool:
    """Restore the weights of ``module`` and make it an adapted layer again.

    Returns:
        Whether that was possible; if not, nothing was changed.
    """
    adapters = record.adapters
    by_weight = adapters.by_weight()
    restored = {
        key: _restored(parameter_of(module, key), by_weight[key], weight) for key, weight in record.weights.items()
    }
    if any(weight is None for weight in restored.values()):
        return False
    cls = adapted_class_for(module, [adapter.part for adapter in adapters.all_pairs()])
    for key, weight in restored.items():
        shared, parameter = record.weights[key].shared, parameter_of(module, key)
        if shared is not None:
            setattr(module, key, shared)
            continue
        after_merge = partial(cls.lora_after_merge, module)  # type: ignore[arg-type]
        journal.steps.append(UnmergedStep(parameter, by_weight[key], record.weights[key], after_merge))
        _write(parameter, weight)
    for key, pairs in by_weight.items():
        for adapter in pairs:
            adapter.to(local_shard(parameter_of(module, key)).device)
    set_adapters(module, cls, adapters)
    record_of(module).merged = None
    return True


def value_before_merge(module: nn.Module, record: Merged, key: str) -> Tensor | None:
    """This rank's part of the parameter ``key`` of ``module`` before the merge; ``None`` if it cannot be computed."""
    return _restored(parameter_of(module, key), record.adapters.by_weight()[key], record.weights[key])


@torch.no_grad()
def _write(parameter: nn.Parameter, value: Tensor | None) -> None:
    assert value is not None
    local_shard(parameter).copy_(value)


@torch.no_grad()
def _restored(parameter: nn.Parameter, adapters: list[Adapter], record: MergedWeight) -> Tensor | None:
    """The value of ``parameter`` before the merge, or ``None`` if it cannot be computed."""
    weight = local_shard(parameter)
    if record.shared is not None:
        return record.shared if checksum(local_shard(record.shared)) == record.original else None
    if checksum(weight) == record.original:  # the base was loaded into the merged layer
        return weight.clone()
    pairs = zip(adapters[0].part.matrices(weight), factors_of(adapters, parameter), record.patches, strict=True)
    matrices = [exact.apply_patch(exact.subtract_delta(matrix, factors), patch) for matrix, factors, patch in pairs]
    original = _as_weight(matrices, weight)
    return original if checksum(original) == record.original else None
