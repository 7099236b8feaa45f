"""The merge of one layer: ``W = W0 + scale * B A`` in place, with what an exact unmerge needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_tensor, local_shard
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of, pop_adapters, set_adapters
from lightning_lora.layers.registry import adapted_class_for
from lightning_lora.model.journal import Journal
from lightning_lora.model.quantized.packed import pack_again, was_changed
from lightning_lora.model.record import Merged, MergedWeight, record_of
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_product import ExactProduct, exact_product
from lightning_lora.ops.exact_sum import quick_checksum
from lightning_lora.ops.workspace import Workspace


def merge_layer(
    layer: LoRALayer, journal: Journal, workspace: Workspace, factors: Mapping[str, float] | None = None
) -> float:
    """Merge the adapters of ``layer``, and give it its plain class back.

    A parameter that other modules have too stays as it is: the layer gets one of its own for the sum.

    Args:
        layer: the adapted layer.
        journal: of the change.
        workspace: where sums are computed.
        factors: of the updates by adapter, as of :meth:`Adapters.to_merge`.

    Returns:
        The share of delta's norm that rounding lost.
    """
    merged: dict[str, MergedWeight] = {}
    norms = exact.Squares()
    factors = dict(layer.lora.strengths_now() if factors is None else factors)
    for key, adapters in layer.lora.to_merge(factors).items():
        parameter = parameter_of(layer, key)
        shared = parameter if key in record_of(layer).shared else None
        if shared is not None:
            setattr(layer, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        merged[key], squares = _merge_into(layer, key, adapters, journal, workspace)
        merged[key].shared = shared
        norms += squares
    record_of(layer).merged = Merged(pop_adapters(layer), merged, factors)
    return norms.lost()


@torch.no_grad()
def _merge_into(
    layer: LoRALayer, key: str, adapters: list[Adapter], journal: Journal, workspace: Workspace
) -> tuple[MergedWeight, exact.Squares]:
    parameter, after_merge = parameter_of(layer, key), layer.lora_after_merge
    if getattr(layer, "max_norm", None) is not None:
        workspace = Workspace()  # the norms of rows have other bits on another device
    merged, record, squares = workspace.compute(partial(_sum, parameter, adapters, after_merge))
    journal.steps.append(MergedStep(parameter, adapters, record))
    local_shard(parameter).copy_(merged)  # one operation: no interrupt comes between
    return record, squares


@torch.no_grad()
def _sum(
    parameter: Tensor, adapters: list[Adapter], after_merge: Callable[[Tensor], bool], workspace: Workspace
) -> tuple[Tensor, MergedWeight, exact.Squares]:
    """The sum for this rank's part of ``parameter``, in the memory of ``workspace``, and how to undo it."""
    weight = workspace.bring(local_shard(parameter))
    originals, deltas = adapters[0].part.matrices(weight), deltas_of(adapters, parameter, weight.device)
    merged = workspace.memory("merged", weight, weight.dtype)
    matrices = matrices_in(merged, originals)
    parts = [exact.merge_delta(*each, workspace) for each in zip(originals, deltas, matrices, strict=True)]
    patches = [patch for patch, _ in parts]
    if after_merge(merged):
        restored = [
            exact.subtract_delta(matrix, delta, torch.empty_like(matrix), workspace)
            for matrix, delta in zip(matrices, deltas, strict=True)
        ]
        patches = [exact.patch_for(*each) for each in zip(originals, restored, strict=True)]
    record = MergedWeight(patches, quick_checksum(merged, workspace), quick_checksum(weight, workspace))
    return merged, record, sum((squares for _, squares in parts), exact.Squares())


@dataclass
class MergedStep:
    """The sum is written into ``parameter``; ``record`` is made before that, and gives the original back."""

    parameter: nn.Parameter
    adapters: list[Adapter]
    record: MergedWeight

    @torch.no_grad()
    def undo(self) -> None:
        """Write the original, whether the sum was written or not."""
        original = _restored(self.parameter, self.adapters, self.record, "", Workspace())
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
        if quick_checksum(local_shard(self.parameter), Workspace()) != self.record.checksum:
            local_shard(self.parameter).copy_(_sum(self.parameter, self.adapters, self.after_merge, Workspace())[0])


def matrices_in(weight: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The memory of ``weight`` as matrices of these shapes; this rank may hold none of a stack of experts."""
    return [part.view(matrix.shape) for part, matrix in zip(weight.view(max(1, len(like)), -1), like, strict=False)]


def deltas_of(adapters: list[Adapter], weight: Tensor, device: torch.device) -> list[ExactProduct]:
    """The sum of every adapter's delta on ``device``, for each matrix in this rank's part of ``weight``."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    experts, rows, columns = adapters[0].part.region(weight)
    by_adapter: list[list[tuple[Tensor, Tensor]]] = []
    for adapter in adapters:
        A, B = (full_tensor(matrix).detach().to(device, dtype) for matrix in (adapter.A, adapter.B))
        left, right = (
            side[experts] if side.dim() == 3 else side.unsqueeze(0)
            for side in adapter.part.factors(A, adapter.scale * B, weight)
        )
        by_adapter.append(list(zip(left, right, strict=True)))
    return [exact_product(factors, dtype).part(rows, columns) for factors in zip(*by_adapter, strict=True)]


def unmerge_layer(module: nn.Module, record: Merged, journal: Journal, workspace: Workspace) -> str | None:
    """Restore the weights of ``module`` and make it an adapted layer again.

    Returns:
        ``None``; or the parameter whose value before the merge cannot be computed, and then nothing was changed.
    """
    by_weight, restored = record.adapters.to_merge(record.factors), dict[str, Tensor | None]()
    packed = record_of(module).packed
    if packed is not None and was_changed(module, packed, workspace):
        return "weight"
    if packed is not None:
        pack_again(module)
    else:
        restored = {
            key: workspace.compute(partial(_restored, parameter_of(module, key), by_weight[key], weight, key))
            for key, weight in record.weights.items()
        }
    for key, weight in restored.items():
        if weight is None:
            return key
    cls = adapted_class_for(module, [adapter.part for adapter in record.adapters.all_pairs()])
    for key, weight in restored.items():
        shared, parameter = record.weights[key].shared, parameter_of(module, key)
        if shared is not None:
            setattr(module, key, shared)
            continue
        after_merge = partial(cls.lora_after_merge, module)  # type: ignore[arg-type]
        journal.steps.append(UnmergedStep(parameter, by_weight[key], record.weights[key], after_merge))
        assert weight is not None
        local_shard(parameter).copy_(weight)
    for adapter in record.adapters.all_pairs():
        adapter.to(local_shard(parameter_of(module, adapter.part.key)).device)
    set_adapters(module, cls, record.adapters)
    record_of(module).merged = None
    return None


def value_before_merge(module: nn.Module, record: Merged, key: str) -> Tensor | None:
    """This rank's part of the parameter ``key`` of ``module`` before the merge; ``None`` if it cannot be computed."""
    adapters = record.adapters.to_merge(record.factors)[key]
    return _restored(parameter_of(module, key), adapters, record.weights[key], key, Workspace())


@torch.no_grad()
def _restored(
    parameter: nn.Parameter, adapters: list[Adapter], record: MergedWeight, key: str, workspace: Workspace
) -> Tensor | None:
    """The value of ``parameter`` before the merge, or ``None`` if it cannot be computed.

    It is in the memory of ``workspace`` for ``key``.
    """
    if record.shared is not None:
        return record.shared if quick_checksum(local_shard(record.shared), workspace) == record.original else None
    weight = workspace.bring(local_shard(parameter))
    present = quick_checksum(weight, workspace)
    original = workspace.memory(f"original {key}", weight, weight.dtype)
    if present == record.original:  # the base was loaded into the merged layer
        return original.copy_(weight)
    if present != record.checksum:
        return None
    matrices, deltas = adapters[0].part.matrices(weight), deltas_of(adapters, parameter, weight.device)
    parts = zip(matrices, deltas, matrices_in(original, matrices), record.patches, strict=True)
    for matrix, delta, out, patch in parts:
        exact.apply_patch(exact.subtract_delta(matrix, delta, out, workspace), patch)
    return original if quick_checksum(original, workspace) == record.original else None
