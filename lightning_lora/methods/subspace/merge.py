"""The merge of a subspace: ``theta_0 + P z`` is written into the parameters, rounded once, and taken out bit for bit.

The originals wait in CPU memory, so the merged model takes the memory of its projected parameters twice, and a pickle
of it is as much larger. To subtract P z again would not be exact: sums were rounded, and P z may differ between devices
in its last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.distributed.sharded import full_parameters, local_shard, shape_of, shard_region
from lightning_lora.layers.adapted import swap_in, swap_out
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.embedding import renormalise
from lightning_lora.methods.subspace.connections import subspaces
from lightning_lora.methods.subspace.layer import Subspace, mixin_for
from lightning_lora.model.journal import Journal, Overwritten
from lightning_lora.model.record import merged_children, record_of
from lightning_lora.ops.exact_sum import checksum


@dataclass
class MergedModule:
    """What undoes the merge of one module.

    Args:
        child: which the module had.
        originals: this rank's part of each parameter before the merge, on the CPU; a tied one stands with its owner.
        checksums: of the merged parameters.
    """

    key: ClassVar[str] = "subspace"
    child: Subspace
    originals: dict[str, Tensor]
    checksums: dict[str, int]

    def unmerge(self, model: nn.Module, journal: Journal) -> None:
        """As :func:`unmerge`."""
        unmerge(model, journal)

    def merge(self, model: nn.Module, journal: Journal) -> dict[str, float]:
        """As :func:`merge`."""
        return merge(model, journal)


def merged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, MergedModule]]:
    """Every module of ``model`` with a merged subspace, with its first clean name."""
    for name, module, merged in merged_children(model):
        if isinstance(merged, MergedModule):
            yield name, module, merged


def merge(model: nn.Module, journal: Journal, device: torch.device | None = None) -> dict[str, float]:
    """Merge every module of ``model``.

    Args:
        model: an adapted model.
        journal: of the change.
        device: on which the sums are computed; ``None`` for that of each parameter.

    Returns:
        For each the share of the update's norm that rounding lost.
    """
    lost = {}
    layers = list(subspaces(model))
    merged = {}
    for name, module, child in layers:
        merged[name] = MergedModule(child, {}, {})
        sizes = [_merge_into(module, child, key, merged[name], journal, device) for key in own_keys(child)]
        size = sum(each for each, _ in sizes)
        lost[name] = (sum(each for _, each in sizes) / size) ** 0.5 if size else 0.0
    for name, module, _ in layers:
        swap_out(module)
        record_of(module).merged_child = merged[name]
    return lost


def own_keys(child: Subspace) -> list[str]:
    """The keys whose parameters ``child`` owns: not those that are tied to a module that comes before."""
    return [key for key in child.seeds if key not in child.owners]


@torch.no_grad()
def _merge_into(
    module: nn.Module, child: Subspace, key: str, record: MergedModule, journal: Journal, device: torch.device | None
) -> tuple[float, float]:
    """Write the sum; the squared norms of the update and of what rounding lost."""
    parameter = parameter_of(module, key)
    weight = local_shard(parameter)
    there = weight.to(device)
    delta = child.delta(shape_of(parameter), key, there.device)[shard_region(parameter)]
    total = (there + delta).to(weight.dtype)
    rounding = total.double() - there.double() - delta.double()
    total = _as_read(total, module)
    record.originals[key] = weight.to("cpu", copy=True)
    record.checksums[key] = checksum(total)
    journal.steps.append(Overwritten(weight, record.originals[key]))
    weight.copy_(total)
    return float(delta.double().square().sum()), float(rounding.square().sum())


def _as_read(total: Tensor, module: nn.Module) -> Tensor:
    """The sum as a plain embedding with ``max_norm`` would leave it, which renormalises the rows that it reads."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        renormalise(total, module.max_norm, module.norm_type)
    return total


@torch.no_grad()
def unmerge(model: nn.Module, journal: Journal) -> None:
    """Write the originals, and adapt the modules again.

    Raises:
        ValueError: if a merged parameter was changed since; nothing is changed then.
    """
    merged = list(merged_modules(model))
    for name, module, record in merged:
        for key, value in record.checksums.items():
            present = checksum(local_shard(parameter_of(module, key)))
            if present not in (value, checksum(record.originals[key])):  # the base may have been loaded into it
                raise ValueError(
                    f"`{names.join(name, key)}` is not what the merge left there: it was changed, cast or loaded "
                    "since, so the base cannot be restored. Nothing was changed."
                )
    for _, module, record in merged:
        for key, original in record.originals.items():
            weight = local_shard(parameter_of(module, key))
            journal.keep(weight)
            weight.copy_(original)
        record_of(module).merged_child = None
        record.child.to(local_shard(parameter_of(module, next(iter(record.child.seeds)))).device)
        swap_in(module, mixin_for(module), record.child)


@torch.no_grad()
def merged_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of the merged model by clean name, one at a time; ``model`` is not changed.

    Tied parameters are the same object. Every rank must iterate to the end.
    """
    projected = {
        id(parameter_of(module, key)): (module, child, key)
        for _, module, child in subspaces(model)
        for key in own_keys(child)
    }
    added = {id(inner) for _, _, child in subspaces(model) for inner in child.modules()}
    users: dict[int, list[str]] = {}
    for name, module in names.named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and id(module) not in added:
                users.setdefault(id(parameter), []).append(names.join(name, key))
    of_name = {name: id(parameter) for name, parameter in names.named_parameters(model)}
    for first, value in full_parameters(model):
        total = value
        if of_name[first] in projected:
            module, child, key = projected[of_name[first]]
            total = _as_read(child.total(value, key), module)
        yield from ((name, total) for name in users.get(of_name[first], ()))
    for name, module in names.named_modules(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield names.join(name, key), buffer
