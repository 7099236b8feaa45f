"""Updates of one form, whose small products are one launch for all of them.

A measurement takes a dozen products of r columns for each layer. On a GPU they take longer to launch than to compute.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lightning_lora.analysis.decomposition import Core, grams
from lightning_lora.analysis.updates import Update
from lightning_lora.layers.base import parameter_of
from lightning_lora.ops.low_rank import DeltaFactors

MAX_ELEMENTS = 2**22  # of A and B of one group: 32 MB in fp64
ROWS = 4096  # of a weight in half precision that are cast for one product


class UpdateGroup:
    """Updates whose A and B have the same shapes, and lie on one device.

    Args:
        updates: at least one.
    """

    def __init__(self, updates: list[Update]) -> None:
        self.updates = updates
        self.core: Core | None = None
        self.products: dict[str, Tensor] = {}
        self.directions: tuple[Tensor, Tensor] | None = None

    def factors(self) -> DeltaFactors:
        """``scale * B``, ``(updates, ..., out_features, r)``, and A, ``(updates, ..., r, in_features)``, in fp64."""
        every_B, every_A = zip(*(update.matrices() for update in self.updates), strict=True)
        return self.updates[0].pair.scale * torch.stack(every_B).double(), torch.stack(every_A).double()

    def grams(self, r: int) -> Tensor:
        """As :func:`lightning_lora.analysis.decomposition.grams`, of all matrices of all updates."""
        return grams(self.factors(), r)

    def add(self, update: Update, matrix: Tensor) -> Tensor | None:
        """Multiply the frozen ``matrix`` of ``update`` by the singular directions of the update's input.

        Returns:
            ``|U^T W V|_F`` of every matrix of the group in fp64, ``(updates, ...)``, if this was the last one of the
            group; otherwise ``None``. The group then keeps no tensors.
        """
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        U, V = self.directions = self.directions or self._directions(dtype)
        index = self.updates.index(update)
        with torch.autocast(matrix.device.type, enabled=False):
            product = _product(matrix, V[index].to(matrix.device, dtype))
        self.products[update.name] = product.to(U.device)
        if len(self.products) < len(self.updates):
            return None
        products = torch.stack([self.products[update.name] for update in self.updates])
        self.products, self.directions = {}, None
        return norms(U.mT @ products.double())

    def _directions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U in fp64, ``(updates, ..., out_features, r)``, and V in ``dtype``, ``(updates, ..., in_features, r)``."""
        assert self.core is not None
        B, A = self.factors()
        r = B.shape[-1]
        left, right = (side[:, :r, :r].reshape(*B.shape[:-2], r, r).to(B.device) for side in self.core[1:])
        return B @ left, (A.mT @ right).to(dtype)


def groups_of(updates: list[Update]) -> list[UpdateGroup]:
    """The updates in groups, in an order that is the same on every rank."""
    groups: dict[Hashable, list[list[Update]]] = {}
    for update in updates:
        pair, weight = update.pair, parameter_of(update.module, update.pair.part.key)
        form = (pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype, pair.A.device, pair.scale, weight.dtype)
        filled = groups.setdefault(form, [[]])
        if filled[-1] and (len(filled[-1]) + 1) * (pair.A.numel() + pair.B.numel()) > MAX_ELEMENTS:
            filled.append([])
        filled[-1].append(update)
    return [UpdateGroup(members) for filled in groups.values() for members in filled]


def _product(matrix: Tensor, V: Tensor) -> Tensor:
    """``W V``; a matrix in half precision is cast in blocks of rows, so that never all of it is cast at one time."""
    if matrix.dtype == V.dtype:
        return matrix @ V
    return torch.cat([rows.to(V.dtype) @ V for rows in torch.split(matrix, ROWS, -2)], -2)


def norms(matrix: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, summed in fp64."""
    each: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
    return each
