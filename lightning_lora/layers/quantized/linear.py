"""LoRA for a linear layer with a quantized weight: the adapter adds the low-rank term to the output of the layer.

Where the fused ops can be used, they add it, and compute the matrix of the weight once for forward and once for
backward. Elsewhere, as on a CPU and under a compiler, the layer of the other library runs, and the term is added to
its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.choice import Choice
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.mixed.linear import mixed_layer
from lightning_lora.layers.mixed.terms import add_terms
from lightning_lora.layers.quantized.biases import bias_in
from lightning_lora.layers.quantized.formats import matrix_shape
from lightning_lora.layers.quantized.packed import packed_weight
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import fuse
from lightning_lora.ops.packed.shared_cast import shared_cast


class LoRAQuantizedLinear(LoRALayer, nn.Linear):
    """Mixin for a linear layer with a quantized weight; A and B are fp32."""

    original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """One matrix, whose shape the codes do not have."""
        rows, columns = matrix_shape(module)
        return [WeightPart(shape=(rows, columns))]

    def forward(self, input: Tensor) -> Tensor:
        """The base output of the quantized layer plus the low-rank term of each adapter."""
        adapters: Any = self._modules["lora"]  # reading attributes of a module takes longer
        choice = adapters.choice_now()
        mixed = None if choice is None or choice.is_uniform or not adapters.enabled else choice
        terms = adapters.terms(input) if mixed is None else None
        y = None if torch.compiler.is_dynamo_compiling() else self._fused(input, adapters, mixed, terms)
        if y is not None:
            return y
        return add_terms(super().forward(input), adapters.terms(input) if terms is None else terms, [input])

    def _fused(self, input: Tensor, adapters: Any, mixed: Choice | None, terms: Any) -> Tensor | None:
        """The sum as one node of autograd; ``None`` where that is not possible.

        Args:
            input: of the layer.
            adapters: of the layer.
            mixed: the choice of a batch whose samples use different adapters.
            terms: that act on ``input`` where there is no such choice.
        """
        weight = packed_weight(self, input, super().forward) if mixed is not None or len(terms) == 1 else None
        if weight is None:
            return None
        x, bias = shared_cast(input, weight.dtype), bias_in(self, weight.dtype)
        if mixed is None:
            y = fuse(x, weight, bias, terms)
        else:
            y = mixed_layer(adapters, mixed).output(x, weight, bias, mixed)
        return None if y is None else y.to(input.dtype)
