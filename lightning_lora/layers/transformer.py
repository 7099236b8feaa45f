"""``nn.TransformerEncoder`` and its layers, whose fast path in evaluation is one kernel that reads all weights.

The fast path bypasses the forward of adapted layers inside. So where adapters act it is disabled, or it reads merged
weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.merged_forward import (
    call_on_merged_weights,
    can_use_merged_weights,
    has_active_adapters,
)
from lightning_lora.layers.restoring import Restoring, Undo


class LoRATransformerEncoderLayer(LoRALayer, nn.TransformerEncoderLayer):
    """An ``nn.TransformerEncoderLayer`` with adapters inside; it has none of its own."""

    original_class = nn.TransformerEncoderLayer

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the plain layer."""
        if self.training and torch.is_grad_enabled():  # torch then calls each layer
            return super().forward(src, *args, **kwargs)
        if not has_active_adapters(self):
            return super().forward(src, *args, **kwargs)
        if can_use_merged_weights(self, src):
            return call_on_merged_weights(self, super().forward, src, *args, **kwargs)
        with fast_path_disabled(self, "activation_relu_or_gelu"):
            return super().forward(src, *args, **kwargs)


class LoRATransformerEncoder(LoRALayer, nn.TransformerEncoder):
    """An ``nn.TransformerEncoder`` with adapters inside: it makes nested tensors only if its layers accept them."""

    original_class = nn.TransformerEncoder

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the plain module."""
        if self.layers[0].training and torch.is_grad_enabled():  # torch then makes no nested tensors
            return super().forward(src, *args, **kwargs)
        if not has_active_adapters(self) or (can_use_merged_weights(self, src) and not torch.compiler.is_compiling()):
            return super().forward(src, *args, **kwargs)
        with fast_path_disabled(self, "use_nested_tensor"):
            return super().forward(src, *args, **kwargs)


def fast_path_disabled(module: nn.Module, gate: str) -> AbstractContextManager[None]:
    """Context manager in which the attribute ``gate``, which torch tests before a fast path, is 0."""
    return Restoring(partial(_set_to_0, module, gate))


def _set_to_0(module: nn.Module, gate: str, undo: Undo) -> None:
    undo.append(partial(setattr, module, gate, getattr(module, gate)))
    setattr(module, gate, 0)


class WithoutFastPath(Adapted):
    """An ``nn.TransformerEncoderLayer`` in which a method acts on activations: its fast path would bypass them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the plain layer, by its separate layers."""
        with fast_path_disabled(self, "activation_relu_or_gelu"):
            return super().forward(*args, **kwargs)


class WithoutNestedTensors(Adapted):
    """An ``nn.TransformerEncoder`` around such layers: it makes nested tensors, which only the fast path takes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the plain module, with padded tensors."""
        with fast_path_disabled(self, "use_nested_tensor"):
            return super().forward(*args, **kwargs)
