"""AdapterFusion of one module: attention over the updates of its frozen bottlenecks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from lightning_lora.layers.adapted import FullPrecision
from lightning_lora.layers.transformer import WithoutFastPath, WithoutNestedTensors
from lightning_lora.methods.bottleneck.layer import Bottleneck
from lightning_lora.methods.bottleneck.places import AfterMLP, AfterModule, AtSite, MLPEntry


class FrozenBottleneck(Bottleneck):
    """A trained bottleneck whose values are buffers: they never train, and a state dict holds them."""

    def freeze(self) -> Self:
        """Make the parameters buffers."""
        for name, parameter in list(self._parameters.items()):
            del self._parameters[name]
            self.register_buffer(name, None if parameter is None else parameter.detach())
        return self

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():  # the values stay fp32 when the model is cast
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


class Fusion(AtSite, FullPrecision):
    """``y + V sum_i softmax_i((W_q y + b_q) (W_k u_i + b_k)) u_i`` for the updates ``u_i`` of the bottlenecks.

    Args:
        adapters: the bottlenecks by name, all on one module.
        init_std: standard deviation of the initial ``W_q`` and ``W_k``; ``V`` is the identity, the biases are zero.
        seed: of a generator of its own.

    Source: Pfeiffer et al. 2021 (arXiv 2005.00247), section 3.2.
    """

    query: nn.Parameter
    query_bias: nn.Parameter
    key: nn.Parameter
    key_bias: nn.Parameter
    value: nn.Parameter

    def __init__(self, adapters: Mapping[str, FrozenBottleneck], *, init_std: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        first = next(iter(adapters.values()))
        self.site, self.features, self.channel_dim = first.site, first.features, first.channel_dim
        self.init_std, self.seed = init_std, seed
        self.adapters = nn.ModuleDict(adapters)
        for name in ("query", "key", "value"):
            self.register_parameter(name, self._new(first.down.device, 2))
        for name in ("query_bias", "key_bias"):
            self.register_parameter(name, self._new(first.down.device, 1))
        if not self.query.is_meta:
            self.reset_parameters()

    def _new(self, device: torch.device, dims: int) -> nn.Parameter:
        return nn.Parameter(torch.empty([self.features] * dims, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the matrices; with one bottleneck the output is then that bottleneck's."""
        generator = torch.Generator().manual_seed(self.seed)
        for matrix in (self.query, self.key):
            initial = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
            matrix.copy_(initial.normal_(0, self.init_std, generator=generator))
        self.value.copy_(torch.eye(self.features))
        self.query_bias.zero_()
        self.key_bias.zero_()

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """``y`` and the fused updates for ``x``, which is ``y`` if there is no other input."""
        return self.add(y, y if x is None else x, self.update)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """The fused updates, of the shape of ``x``: ``(..., features)``."""
        updates = torch.stack([cast(Bottleneck, adapter).update(x) for adapter in self.adapters.values()], -2)
        mixed = (self.weights(y, updates).unsqueeze(-1) * updates).sum(-2)
        return F.linear(mixed, self.value.to(mixed.dtype))

    def weights(self, y: Tensor, updates: Tensor) -> Tensor:
        """The share of each bottleneck, ``(..., bottlenecks)``.

        Args:
            y: the output of the module, ``(..., features)``.
            updates: of the bottlenecks, ``(..., bottlenecks, features)``.
        """
        y = y.to(updates.dtype)
        query = F.linear(y, self.query.to(y.dtype), self.query_bias.to(y.dtype))
        key = F.linear(updates, self.key.to(y.dtype), self.key_bias.to(y.dtype))
        return (query.unsqueeze(-2) * key).sum(-1).softmax(-1).to(updates.dtype)


class FusionLayer(AfterModule):
    """A module with a fusion after it."""

    method_key: ClassVar[str] = "fusion"


class ParallelFusionLayer(AfterMLP):
    """The last module of an MLP, or all of it, with a fusion whose bottlenecks read the input of the MLP."""

    method_key: ClassVar[str] = "fusion"


class FusionEntryLayer(MLPEntry):
    """The first layer of an MLP, whose last layer has the fusion."""

    method_key: ClassVar[str] = "fusion"


class FusionEncoderLayer(WithoutFastPath):
    """An ``nn.TransformerEncoderLayer`` with fusions inside."""

    method_key: ClassVar[str] = "fusion"


class FusionEncoder(WithoutNestedTensors):
    """An ``nn.TransformerEncoder`` with fusions inside."""

    method_key: ClassVar[str] = "fusion"
