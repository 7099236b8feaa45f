"""A module whose parameters are read as ``theta_0 + P z``, and the child of it that computes the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import is_sharded
from lightning_lora.layers.adapted import Adapted, FullPrecision
from lightning_lora.layers.base import parameter_of
from lightning_lora.methods.subspace.projections import project


class Subspace(FullPrecision):
    """What one module reads of the subspace. One child of the model holds z, and the others refer to that child.

    Args:
        projection: ``"fastfood"`` or ``"dense"``.
        seeds: of the rows of P, by the keys of the parameters that are read as sums.
        dimension: of z, if this child is the one that holds it.
        structure: whether the module has a factor on its part of ``P z``.
        device: of z and the factor.
    """

    z: nn.Parameter | None
    scale: nn.Parameter | None
    enabled: bool = True  # of the child that holds z: whether it acts
    rows: int = 1  # of P in all, of the child that holds z

    def __init__(
        self, projection: str, seeds: Mapping[str, int], dimension: int | None, structure: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.projection, self.seeds = projection, dict(seeds)
        # References of these kinds are no children: the parameters of another child keep one name.
        self.shared: tuple[Subspace, ...] = ()
        self.owners: dict[str, tuple[Subspace, ...]] = {}
        z = None if dimension is None else nn.Parameter(torch.empty(dimension, dtype=torch.float32, device=device))
        scale = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device)) if structure else None
        self.register_parameter("z", z)
        self.register_parameter("scale", scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros for z, so that the model starts as the base, and 1 for the factor."""
        if self.z is not None:
            self.z.zero_()
        if self.scale is not None:
            self.scale.fill_(1)

    @property
    def holder(self) -> Subspace:
        """The child that holds z."""
        return self.shared[0] if self.shared else self

    def forward(self, weight: Tensor, key: str) -> Tensor:
        """``weight + P z``, of the shape and dtype of ``weight``, differentiable by z and the factor.

        As in a merge the sum is computed in fp32 or better, and rounded once. It requires a gradient in inference too,
        as the weight does, since torch may compute another product with a tensor that requires none.
        """
        if torch.compiler.is_compiling():
            return self.total(weight, key)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            total = self.total(weight, key)
            return total if grad else total.requires_grad_()

    def total(self, weight: Tensor, key: str) -> Tensor:
        """The sum for the full values ``weight`` of the parameter ``key``."""
        return (weight + self.delta(weight.shape, key, weight.device)).to(weight.dtype)

    def delta(self, shape: torch.Size, key: str, device: torch.device) -> Tensor:
        """``P z`` of the parameter ``key``, in fp32."""
        holder, owner = self.holder, self.owners[key][0] if key in self.owners else self
        assert holder.z is not None
        z = holder.z * holder.rows**-0.5  # so that the columns of P have unit norm
        if owner.scale is not None:
            z = z * owner.scale
        return project(z.to(device), self.seeds[key], shape, self.projection)

    def extra_repr(self) -> str:
        """The keys, for ``print(model)``."""
        return ", ".join(self.seeds)


class SubspaceLayer(Adapted):
    """Mixin for a module with projected parameters: whatever code reads the attribute gets the sum.

    Values written into the sum are lost: write into ``module._parameters[key]``. As P is made anew for each read, it
    takes no memory between them.
    """

    method_key = "subspace"
    subspace: Subspace

    def __getattr__(self, name: str) -> Any:
        """A parameter, a buffer or a child, which are in no instance dict; a projected parameter as the sum."""
        value: Any = super().__getattr__(name)
        child: Any = self._modules.get("subspace")
        if child is None or name not in child.seeds or not child.holder.enabled or not _has_values(value):
            return value
        return child(value, name)

    @torch.no_grad()
    def leave_update(self, keep: Callable[[Tensor], bool]) -> bool:
        """Write the sums into the parameters, unless z is zero."""
        z = self.subspace.holder.z
        for key in self.subspace.seeds if z is not None and bool(z.any()) else ():
            weight = parameter_of(self, key)
            if keep(weight):
                weight.copy_(self.subspace.total(weight, key))
        return True


class SubspaceRecurrent(SubspaceLayer):
    """Mixin for a recurrent layer of torch, which reads its parameters from a list."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        # Torch sets it again when the module moves. The plain module, later, must find its parameters there.
        self.__dict__["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]


def mixin_for(module: nn.Module) -> type[SubspaceLayer]:
    """The class that ``module`` gets in addition to its own."""
    return SubspaceRecurrent if isinstance(module, nn.RNNBase) else SubspaceLayer


def _has_values(weight: Tensor) -> bool:
    """Whether the full values are in memory: FSDP reads the attribute too, of a shard or of freed memory."""
    if torch.compiler.is_compiling():
        return True
    return not is_sharded(weight) and (weight.is_meta or not weight.numel() or bool(weight.untyped_storage().size()))
