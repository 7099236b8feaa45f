"""The smallest method that adds something: a bottleneck after linear layers, in a dozen lines of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapted import Adapted, FullPrecision
from lightning_lora.methods.added import AddedMethod
from lightning_lora.methods.added_config import AddedConfig


@dataclass(frozen=True, kw_only=True)
class ToyConfig(AddedConfig):
    size: int = 3


class Toy(FullPrecision):
    def __init__(self, features: int, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(size, features, generator=generator))
        self.up = nn.Parameter(torch.zeros(features, size))

    def forward(self, y: Tensor) -> Tensor:
        return y + (y.float() @ self.down.T @ self.up.T).to(y.dtype)


class ToyLayer(Adapted):
    method_key = "toy"

    def forward(self, *args, **kwargs):
        return self.toy(super().forward(*args, **kwargs))


class ToyMethod(AddedMethod):
    key = "toy"
    config: ToyConfig

    def sites(self, survey):
        sites = {name: module for name, module in survey.by_name.items() if isinstance(module, nn.Linear)}
        if not sites:
            raise ValueError("The model has no linear layer for a toy.")
        return sites

    def mixin(self, module):
        return ToyLayer

    def new(self, name, module, seed):
        return Toy(module.out_features, self.config.size, seed).to(module.weight.device)
