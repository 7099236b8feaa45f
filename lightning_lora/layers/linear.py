"""LoRA for linear layers: ``nn.Linear``, Hugging Face's ``Conv1D`` and quantized layers.

``Conv1D`` keeps its weight transposed. Quantized layers, as those of bitsandbytes, have no matrix that could be read:
the adapter adds its term to their output. They are recognised by the library that their class comes from, which is not
imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_view import Part
from lightning_lora.ops.fused_dropout import can_drop, frozen_with_dropped
from lightning_lora.ops.fused_linear import computed_dtype, frozen_with_low_rank, in_one
from lightning_lora.ops.linear import add_hidden, add_low_rank, frozen_linear
from lightning_lora.ops.shared_input import Siblings, frozen_with_hidden


class LinearAdapter(Adapter):
    """Adds ``scale * B A x``."""

    siblings: Siblings | None = None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output ``y`` of shape ``(..., out_features)`` with the term for its input ``x``."""
        B = self.part.placed(self.B, y.shape[-1])
        siblings = self.siblings if torch.compiler.is_compiling() and not self._probability() else None
        if siblings is not None and siblings.can_share(self, x):
            return add_hidden(y, siblings.traced(self, x), B, self.scale)
        return add_low_rank(y, self.dropped(x), self.A, B, self.scale)

    def with_frozen(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with the term, of one node where that serves."""
        p = self._probability()
        if self._is_watched() or not in_one(x, weight, bias, self.A, self.B) or (p and not can_drop(x, p, self.r)):
            y: Tensor = self(frozen_linear(x, weight, bias), x)
            return y
        dtype = computed_dtype(x)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        shared = None if self.siblings is None or p else self.siblings.read(self, x)
        if shared is not None:
            return frozen_with_hidden(shared, weight, bias, self.B)
        if p:
            return frozen_with_dropped(x.to(dtype), weight, bias, self.A, self.B, self.scale, p)
        return frozen_with_low_rank(x.to(dtype), weight, bias, self.A, self.B, self.scale)

    def _probability(self) -> float:
        """Of dropping an input now."""
        return self.dropout if self.training else 0.0

    def _is_watched(self) -> bool:
        """Whether somebody hooks on to calls of it, which there are none of then."""
        own = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return bool(own) or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]


class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with adapters: ``W0 x + b + scale * B A x``."""

    lora_original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The frozen map, then each adapter's term."""
        adapters = self.lora.active()
        if len(adapters) == 1:
            return adapters[0].with_frozen(input, self.weight, self.bias)  # type: ignore[operator, no-any-return]
        y = frozen_linear(input, self.weight, self.bias)
        for adapter in adapters:
            y = adapter(y, input)
        return y


class LoRAQuantizedLinear(LoRALayer, nn.Linear):
    """Mixed into a linear layer that keeps its weight in few bits: A and B are in fp32 beside it."""

    lora_original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The class's own map, then each adapter's term."""
        y: Tensor = super().forward(input)
        for adapter in self.lora.active():
            y = adapter(y, input)
        return y


class TransposedLinear(LoRALayer):
    """Mixed into the class found in the model, so that transformers is never imported; its weight is ``(in, out)``."""

    lora_adapter_class = LinearAdapter

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[Part]:
        """One matrix, kept the other way round."""
        return [Part(transposed=True)]

    def forward(self, x: Tensor) -> Any:
        """The frozen map, then each adapter's term."""
        y = super().forward(x)
        for adapter in self.lora.active():
            y = adapter(y, x)
        return y


def transposed_root(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class named ``Conv1D`` that ``cls`` is or derives from, told from ``nn.Conv1d`` by its case and its bases."""
    return next((base for base in cls.__mro__ if base.__name__ == "Conv1D" and issubclass(base, nn.Module)), None)


def transposed_kind(root: type[nn.Module]) -> type[LoRALayer]:
    """The adapted class for that ``Conv1D``."""
    return type("LoRAConv1D", (TransposedLinear, root), {"lora_original_class": root, "__module__": __name__})


def is_quantizing(cls: type[nn.Module]) -> bool:
    """Whether layers of class ``cls`` keep a weight that is no matrix."""
    known = any(base.__module__.partition(".")[0] == "bitsandbytes" for base in cls.__mro__)
    return known and issubclass(cls, nn.Linear)  # its embeddings are plain
