"""What the children of a model hold in common: z, the number of rows of P, and the rows of tied parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_lora.distributed.sharded import shape_of
from lightning_lora.layers.adapted import adapted_modules
from lightning_lora.layers.adapter import seed_of
from lightning_lora.layers.base import parameter_of
from lightning_lora.methods.subspace.layer import Subspace, SubspaceLayer
from lightning_lora.methods.subspace.sites import Keys


def subspaces(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer, Subspace]]:
    """The adapted modules of ``model`` with their names and their children."""
    for name, module in adapted_modules(model):
        if isinstance(module, SubspaceLayer):
            yield name, module, module.subspace


def holders(model: nn.Module) -> list[Subspace]:
    """The children that hold z: one, unless parts of the model were adapted before the whole."""
    return [child for _, _, child in subspaces(model) if child.z is not None]


def connect(model: nn.Module, keys: Mapping[str, Keys], seed: int | None) -> None:
    """Let every child of ``model`` refer to one that holds z, and tied parameters to the module that comes first.

    Called again it changes nothing, and connects what came into the model since.
    """
    first, *_ = present = holders(model)
    owners: dict[str, tuple[Subspace, str]] = {}
    for name, _, child in subspaces(model):
        if child.z is None and not any(child.holder is holder for holder in present):
            child.shared = (first,)
        for key, row_name in keys.get(name, {}).items():
            owner, owner_key = owners.setdefault(row_name, (child, key))
            child.seeds.setdefault(key, seed_of(seed, row_name, "subspace"))
            if owner is not child or owner_key != key:
                child.seeds[key], child.owners[key] = owner.seeds[owner_key], (owner,)
    for holder in present:
        holder.rows = sum(_rows(model, holder))


def _rows(model: nn.Module, holder: Subspace) -> Iterator[int]:
    """The elements of each parameter that is read as a sum with this z, tied ones once."""
    for _, module, child in subspaces(model):
        if child.holder is holder:
            yield from (shape_of(parameter_of(module, key)).numel() for key in child.seeds if key not in child.owners)
