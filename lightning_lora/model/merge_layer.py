"""The merge of one layer: ``W = W0 + scale * B A`` in place, with what an exact unmerge needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_tensor, local_shard
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of, pop_adapters, set_adapters
from lightning_lora.layers.registry import adapted_class_for
from lightning_lora.model.record import Merged, MergedWeight, record_of
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_sum import checksum


def merge_layer(layer: LoRALayer) -> float:
    """Merge all adapters of ``layer``, or none, and give it its plain class back.

    A parameter that other modules have too stays as it is: the layer gets one of its own for the sum.

    Returns:
        The share of delta's norm that rounding lost.
    """
    merged: dict[str, MergedWeight] = {}
    sums: list[exact.MergedMatrix] = []
    key, shared = "", None
    try:
        for key, adapters in layer.lora.by_weight().items():
            parameter = parameter_of(layer, key)
            shared = parameter if key in record_of(layer).shared else None
            if shared is not None:
                setattr(layer, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            merged[key], weight_sums = _merge_into(layer, key, adapters)
            merged[key].shared = shared
            sums += weight_sums
    except BaseException:
        if shared is not None:
            setattr(layer, key, shared)
        _put_back(layer, Merged(layer.lora, merged))
        raise
    record_of(layer).merged = Merged(pop_adapters(layer), merged)
    size = math.hypot(*(each.size for each in sums))
    return math.hypot(*(each.lost * each.size for each in sums)) / size if size else 0.0


@torch.no_grad()
def _merge_into(layer: LoRALayer, key: str, adapters: list[Adapter]) -> tuple[MergedWeight, list[exact.MergedMatrix]]:
    weight, matrices_of = local_shard(parameter_of(layer, key)), adapters[0].part.matrices
    before, originals, factors = checksum(weight), matrices_of(weight), factors_of(adapters, parameter_of(layer, key))
    sums = [exact.add_delta(*pair) for pair in zip(originals, factors, strict=True)]
    merged = _as_weight([each.merged for each in sums], weight)
    record = MergedWeight(_patches(originals, sums), checksum(merged), before)
    weight.copy_(merged)  # the last step that an error could come before
    if layer.lora_after_merge(weight):
        for each, matrix, pairs in zip(sums, matrices_of(weight), factors, strict=True):
            each.roundtrip = exact.subtract_delta(matrix, pairs)
        record.patches, record.checksum = _patches(originals, sums), checksum(weight)
    return record, sums


def _as_weight(matrices: list[Tensor], weight: Tensor) -> Tensor:
    """The matrices as one tensor like ``weight``. This rank may hold none of a stack of experts."""
    return torch.stack(matrices).view(weight.shape) if matrices else weight.clone()


def _patches(originals: list[Tensor], sums: list[exact.MergedMatrix]) -> list[exact.Patch]:
    return [exact.patch_for(matrix, each.roundtrip) for matrix, each in zip(originals, sums, strict=True)]


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


def unmerge_layer(module: nn.Module, record: Merged) -> bool:
    """Restore the weights of ``module`` and make it an adapted layer again.

    Returns:
        Whether that was possible; if not, nothing was changed.
    """
    if not _put_back(module, record):
        return False
    adapters = record.adapters
    for key, pairs in adapters.by_weight().items():
        for adapter in pairs:
            adapter.to(local_shard(parameter_of(module, key)).device)
    set_adapters(module, adapted_class_for(module, [adapter.part for adapter in adapters.all_pairs()]), adapters)
    record_of(module).merged = None
    return True


def _put_back(module: nn.Module, record: Merged) -> bool:
    """Restore every parameter in ``record`` to its value before the merge, or none; whether that was possible."""
    restored = {key: _restored(module, key, record) for key in record.weights}
    if any(weight is None for weight in restored.values()):
        return False
    for key, weight in restored.items():
        shared = record.weights[key].shared
        if shared is not None:
            setattr(module, key, shared)
        elif weight is not None:
            local_shard(parameter_of(module, key)).copy_(weight)
    return True


@torch.no_grad()
def _restored(module: nn.Module, key: str, record: Merged) -> Tensor | None:
    """The parameter ``key`` as it was before the merge, or ``None`` if it cannot be computed."""
    weight, merged = local_shard(parameter_of(module, key)), record.weights[key]
    if merged.shared is not None:
        return merged.shared if checksum(local_shard(merged.shared)) == merged.original else None
    if checksum(weight) == merged.original:  # the base was loaded into the merged layer
        return weight.clone()
    adapters = record.adapters.by_weight()[key]
    pairs = zip(
        adapters[0].part.matrices(weight), factors_of(adapters, parameter_of(module, key)), merged.patches, strict=True
    )
    matrices = [exact.apply_patch(exact.subtract_delta(matrix, factors), patch) for matrix, factors, patch in pairs]
    original = _as_weight(matrices, weight)
    return original if checksum(original) == merged.original else None
