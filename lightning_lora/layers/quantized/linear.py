"""LoRA for a linear layer with a quantized weight: the adapter adds the low-rank term to the output of the layer.

Where the fused ops can be used, they add it, and compute the matrix of the weight once for forward and once for
backward. Elsewhere, as on a CPU and under a compiler, the layer of the other library runs, and the term is added to
its output.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.mixed.terms import MixedTerms, Terms, add_terms
from lightning_lora.layers.quantized.packed import bias_in, packed_weight
from lightning_lora.ops.linear import fuse, fuse_mixed
from lightning_lora.ops.shared_cast import shared_cast


class LoRAQuantizedLinear(LoRALayer, nn.Linear):
    """Mixin for a linear layer with a quantized weight; A and B are fp32."""

    original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The base output of the quantized layer plus the low-rank term of each adapter."""
        adapters: Any = self._modules["lora"]  # reading attributes of a module takes longer
        terms = adapters.terms(input)
        y = None if torch.compiler.is_dynamo_compiling() else self._fused(input, terms)
        return add_terms(super().forward(input), terms, [input]) if y is None else y

    def _fused(self, input: Tensor, terms: Terms | MixedTerms) -> Tensor | None:
        """The sum as one node of autograd; ``None`` where that is not possible."""
        mixed, acting = isinstance(terms, MixedTerms), cast("Any", terms)
        weight = packed_weight(self, input, super().forward) if mixed or len(acting) == 1 else None
        if weight is None:
            return None
        x, bias = shared_cast(input, weight.dtype), bias_in(self, weight.dtype)
        y = fuse_mixed(x, weight, bias, acting.pairs, acting.mixture) if mixed else fuse(x, weight, bias, acting)
        return None if y is None else y.to(input.dtype)
