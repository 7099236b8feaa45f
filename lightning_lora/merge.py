"""``W = W0 + scale * B A``, in place, and back bit for bit (Hu et al. 2021, section 4.1: no added latency)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora import exact
from lightning_lora.bits import checksum
from lightning_lora.freeze import freeze, thaw
from lightning_lora.kinds import swapped_class
from lightning_lora.layer import LoRALayer, adapted_layers, attach, detach, is_adapted, weight_of
from lightning_lora.loading import accept_base, be_strict
from lightning_lora.names import join
from lightning_lora.record import Merged, forget, holders, is_merged, merged_layers, record_of


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
        ValueError: if ``model`` has no adapters, or its weights have no values (the meta device).

    Example:
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Linear(4, 2)
        >>> _ = apply_lora(model, LoRAConfig(targets="all"))
        >>> merge_lora(model)
        {'': 0.0}
    """
    layers = list(adapted_layers(model))
    if not layers and not is_merged(model):
        raise ValueError("The model has no adapters to merge: call `apply_lora`, or load an adapter, first.")
    for name, layer in layers:
        if weight_of(layer).is_meta:
            raise ValueError(
                f"`{join(name, 'weight')}` is on the meta device, without values to merge into: load the base first."
            )
    lost = {name: _merge(layer) for name, layer in layers}
    for holder, _ in holders(model):  # a part of an adapted model stays frozen with it
        thaw(holder)
        be_strict(holder)
    if not undo:
        thaw(model)
        forget(model)
    return lost


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
    merged = list(merged_layers(model))
    if not merged and not is_adapted(model):
        raise ValueError("The model has no merged adapters: it was never merged, or with `undo=False`.")
    for name, module, record in merged:
        if checksum(weight_of(module)) not in (record.checksum, record.original):
            raise ValueError(
                f"`{join(name, 'weight')}` is not what the merge left there: it was changed, cast or loaded since, "
                "so the base cannot be restored. Nothing was changed. To go on from these weights call "
                "`merge_lora(model, undo=False)`."
            )
    for position, (name, module, record) in enumerate(merged):
        if not _unmerge(module, record):
            for _, done, _ in merged[:position]:
                assert isinstance(done, LoRALayer)
                _merge(done)
            raise ValueError(f"`{join(name, 'weight')}` does not fit its merge record. Nothing was changed.")
    for holder, config in holders(model):
        freeze(holder, config)
        accept_base(holder)


@torch.no_grad()
def _merge(layer: LoRALayer) -> float:
    weight, kind = weight_of(layer).detach(), type(layer)
    before, original = checksum(weight), _rows(weight)
    factors = [kind.factors(adapter, weight) for adapter in layer.lora.every()]
    result = exact.added(original, factors)
    weight.copy_(result.merged.view(weight.shape))
    if layer.settle():
        result.nearly = exact.subtracted(_rows(weight), factors)
    patch = exact.patch_for(original, result.nearly)
    record_of(layer).merged = Merged(detach(layer), patch, checksum(weight), before)
    return result.lost


@torch.no_grad()
def _unmerge(module: nn.Module, record: Merged) -> bool:
    weight, kind = weight_of(module).detach(), swapped_class(type(module))
    if checksum(weight) == record.original:  # the base was loaded over the merge
        _reattach(module, record)
        return True
    nearly = exact.subtracted(_rows(weight), [kind.factors(adapter, weight) for adapter in record.adapters.every()])
    original = exact.patched(nearly, record.patch).view(weight.shape)
    if checksum(original) != record.original:
        return False
    weight.copy_(original)
    _reattach(module, record)
    return True


def _reattach(module: nn.Module, record: Merged) -> None:
    attach(module, swapped_class(type(module)), record.adapters.to(weight_of(module).device))
    record_of(module).merged = None


def _rows(weight: Tensor) -> Tensor:
    """A contiguous copy of ``weight`` as a matrix, whatever its memory format."""
    return weight.flatten(1).clone(memory_format=torch.contiguous_format)
