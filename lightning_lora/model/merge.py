"""``W = W0 + scale * B A``, in place, and back bit for bit (Hu et al. 2021, section 4.1: no added latency)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import full_tensor, is_sharded, is_split, local_shard, reshard
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, adapted_layers, attach, detach, is_adapted, parameter_of
from lightning_lora.layers.linear import is_quantizing
from lightning_lora.layers.registry import class_for
from lightning_lora.model.freeze import unfreeze
from lightning_lora.model.hooks import equip, strip
from lightning_lora.model.record import Merged, MergedWeight, forget, holders, is_merged, merged_layers, record_of
from lightning_lora.names import join
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_sum import checksum


def merge_lora(model: nn.Module, undo: bool = True) -> dict[str, float]:
    """Add every adapter to the weight that it adapts, in place, and leave the plain model.

    The sum is made in fp32 (fp64 for an fp64 base) and rounded once. Afterwards classes, keys and ``requires_grad`` are
    the original ones. A record stays on the layers, from which :func:`unmerge_lora` restores the base bit for bit.

    Args:
        model: a model with adapters; one that is merged already stays as it is.
        undo: keep that record; ``False`` forgets it, and the merged weights are then the base.

    Returns:
        For each merged layer the share of delta's norm that rounding to the weight's dtype lost: about 1e-4 or less in
        fp32, much more in half precision when delta is small.

    Raises:
        ValueError: if ``model`` has no adapters, or its weights have no values (the meta device), are in pieces (FSDP1,
            ZeRO 3), tied and sharded, or quantized.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> merge_lora(model)
        {'': 0.0}
    """
    reshard(model)
    layers = list(adapted_layers(model))
    if not layers and not is_merged(model):
        raise ValueError("The model has no adapters to merge: call `apply_lora`, or load an adapter, first.")
    _check_mergeable(model, layers)
    _tell_of_shared(layers)
    lost = _merge_all(layers)
    lost = {name: lost[name] for name, layer in layers if record_of(layer).merged.weights}  # type: ignore[union-attr]
    for holder, _ in holders(model):  # a part of an adapted model stays frozen with it
        strip(holder)
    if not undo:
        unfreeze(model)
        forget(model)
    return lost


def _check_mergeable(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> None:
    for name, layer in layers:
        for key in layer.lora.by_weight():
            if parameter_of(layer, key).is_meta:
                raise ValueError(
                    f"`{join(name, key)}` is on the meta device, without values to merge into: load the base first."
                )
    for name in quantized_layers(model):
        raise ValueError(
            f"`{name}` is quantized, and its few bits cannot hold the sum. Merge the adapter's file into the base in "
            "full precision, and quantize that."
        )
    where = unwritable(model)
    if where is not None:
        raise ValueError(
            f"{where} Merge on one device, into the base and from the adapter's file; LoRACallback writes the merged "
            "weights into one at the end of its run."
        )


def quantized_layers(model: nn.Module) -> list[str]:
    """The adapted layers of ``model`` that cannot take the sum."""
    return [name for name, layer in adapted_layers(model) if is_quantizing(type(layer))]


def unwritable(model: nn.Module) -> str | None:
    """Why the weights of ``model`` cannot take the sum where they are, though a file could; ``None`` where they can."""
    for name, layer in adapted_layers(model):
        for key in layer.lora.by_weight():
            weight = parameter_of(layer, key)
            if is_split(weight):
                return f"`{join(name, key)}` is in pieces, which FSDP1 or ZeRO 3 made of it, and cannot take the sum."
            if is_sharded(weight) and key in record_of(layer).shared:
                return f"`{join(name, key)}` is tied and sharded: FSDP2 would tie it again after it took the sum."
    return None


def unmerge_lora(model: nn.Module) -> None:
    """Take merged adapters out again: the base's weights come back bit for bit, the adapters act again.

    Raises:
        ValueError: if ``model`` was never merged, or a merged weight was changed since; then nothing is changed.

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> _ = merge_lora(model)
        >>> unmerge_lora(model)
        >>> torch.equal(model.weight, before)
        True
    """
    reshard(model)
    merged = list(merged_layers(model))
    if not merged and not is_adapted(model):
        raise ValueError("The model has no merged adapters: it was never merged, or with `undo=False`.")
    _unmerge_all(merged)
    for holder, config in holders(model):
        equip(holder, config)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block every adapter of ``model`` is live; after it the layers that were merged are so again.

    Raises:
        ValueError: if a merged weight was changed since; then nothing is changed.
    """
    reshard(model)
    merged = list(merged_layers(model))
    _unmerge_all(merged)
    try:
        yield
    finally:
        _merge_all([(name, layer) for name, layer, _ in merged if isinstance(layer, LoRALayer)])


def _unmerge_all(merged: list[tuple[str, nn.Module, Merged]]) -> None:
    """Unmerge every layer, or none."""
    for name, module, record in merged:
        for key, weight in record.weights.items():
            if checksum(local_shard(parameter_of(module, key))) not in (weight.checksum, weight.original):
                raise ValueError(
                    f"`{join(name, key)}` is not what the merge left there: it was changed, cast or loaded since, "
                    "so the base cannot be restored. Nothing was changed. To go on from these weights call "
                    "`merge_lora(model, undo=False)`."
                )
    for position, (name, module, record) in enumerate(merged):
        if not _unmerge(module, record):
            for _, done, _ in merged[:position]:
                assert isinstance(done, LoRALayer)
                _merge(done)
            raise ValueError(
                f"`{join(name, next(iter(record.weights)))}` does not fit its merge record. Nothing was changed."
            )


def _merge_all(layers: list[tuple[str, LoRALayer]]) -> dict[str, float]:
    """Merge every layer, or none: what was done before an error or Ctrl-C is undone."""
    lost = {}
    try:
        for name, layer in layers:
            lost[name] = _merge(layer)
    except BaseException:
        for _, module in layers:
            merged = record_of(module).merged
            if merged is not None:
                _unmerge(module, merged)
        raise
    return lost


def _merge(layer: LoRALayer) -> float:
    merged: dict[str, MergedWeight] = {}
    sums: list[exact.MergedMatrix] = []
    key, shared = "", None
    try:
        for key, adapters in layer.lora.by_weight().items():
            own = parameter_of(layer, key)
            shared = own if key in record_of(layer).shared else None
            if shared is not None:
                setattr(layer, key, nn.Parameter(own.detach().clone(), own.requires_grad))
            merged[key], parts = _merge_into(layer, key, adapters)
            merged[key].shared = shared
            sums += parts
    except BaseException:
        if shared is not None:
            setattr(layer, key, shared)
        _put_back(layer, Merged(layer.lora, merged))
        raise
    record_of(layer).merged = Merged(detach(layer), merged)
    size = math.hypot(*(part.size for part in sums))
    return math.hypot(*(part.lost * part.size for part in sums)) / size if size else 0.0


@torch.no_grad()
def _merge_into(layer: LoRALayer, key: str, adapters: list[Adapter]) -> tuple[MergedWeight, list[exact.MergedMatrix]]:
    weight, matrices_of = local_shard(parameter_of(layer, key)), adapters[0].part.matrices
    before, originals, factors = checksum(weight), matrices_of(weight), factors_of(adapters, parameter_of(layer, key))
    sums = [exact.add_delta(*pair) for pair in zip(originals, factors, strict=True)]
    merged = _together([part.merged for part in sums], weight)
    record = MergedWeight(_patches(originals, sums), checksum(merged), before)
    weight.copy_(merged)  # the last step that an error could come before
    if layer.lora_settle():
        for part, matrix, pairs in zip(sums, matrices_of(weight), factors, strict=True):
            part.roundtrip = exact.subtract_delta(matrix, pairs)
        record.patches, record.checksum = _patches(originals, sums), checksum(weight)
    return record, sums


def _together(matrices: list[Tensor], weight: Tensor) -> Tensor:
    """The matrices as one tensor like ``weight``; of a stack of experts this rank may hold none."""
    return torch.stack(matrices).view(weight.shape) if matrices else weight.clone()


def _patches(originals: list[Tensor], sums: list[exact.MergedMatrix]) -> list[exact.Patch]:
    return [exact.patch_for(matrix, part.roundtrip) for matrix, part in zip(originals, sums, strict=True)]


def factors_of(adapters: list[Adapter], weight: Tensor) -> list[exact.Factors]:
    """For each matrix in this rank's part of ``weight`` the factors of every adapter's delta, at least in fp32."""
    dtype, device = torch.promote_types(weight.dtype, torch.float32), local_shard(weight).device
    found: list[list[tuple[Tensor, Tensor]]] = []
    for adapter in adapters:
        A, B = (full_tensor(matrix).detach().to(device, dtype) for matrix in (adapter.A, adapter.B))
        left, right = (
            side if side.dim() == 3 else side.unsqueeze(0)
            for side in adapter.part.factors(A, adapter.scale * B, weight)
        )
        experts, rows, columns = adapter.part.region(weight)
        found.append([(one[rows], other[:, columns]) for one, other in zip(left[experts], right[experts], strict=True)])
    return [list(pairs) for pairs in zip(*found, strict=True)]


def _unmerge(module: nn.Module, record: Merged) -> bool:
    if not _put_back(module, record):
        return False
    adapters = record.adapters
    for key, pairs in adapters.by_weight().items():
        for adapter in pairs:
            adapter.to(local_shard(parameter_of(module, key)).device)
    attach(module, class_for(module, [adapter.part for adapter in adapters.every()]), adapters)
    record_of(module).merged = None
    return True


def _put_back(module: nn.Module, record: Merged) -> bool:
    """Give every parameter in ``record`` the value that it had before the merge: all of them, or none."""
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
    """The parameter ``key`` as it was before the merge, or ``None`` if that cannot be had."""
    weight, merged = local_shard(parameter_of(module, key)), record.weights[key]
    if merged.shared is not None:
        return merged.shared if checksum(local_shard(merged.shared)) == merged.original else None
    if checksum(weight) == merged.original:  # the base was loaded over the merge
        return weight.clone()
    adapters = record.adapters.by_weight()[key]
    pairs = zip(
        adapters[0].part.matrices(weight), factors_of(adapters, parameter_of(module, key)), merged.patches, strict=True
    )
    matrices = [exact.apply_patch(exact.subtract_delta(matrix, factors), patch) for matrix, factors, patch in pairs]
    original = _together(matrices, weight)
    return original if checksum(original) == merged.original else None


def _tell_of_shared(layers: list[tuple[str, LoRALayer]]) -> None:
    for name, layer in layers:
        for key in record_of(layer).shared & layer.lora.by_weight().keys():
            warnings.warn(
                f"`{join(name, key)}` was shared with another module, and merged it is a parameter of its own. A model "
                "into which the merged weights are loaded must not tie the two (`tie_word_embeddings=False` in "
                "transformers).",
                stacklevel=3,
            )
