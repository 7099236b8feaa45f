"""LoRA for a linear layer with a quantized weight: the adapter adds the low-rank term to the output of the layer."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.mixed.terms import add_terms


class LoRAQuantizedLinear(LoRALayer, nn.Linear):
    """Mixin for a linear layer with a quantized weight; A and B are fp32."""

    original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The base output of the quantized layer plus the low-rank term of each adapter."""
        y: Tensor = super().forward(input)
        return add_terms(y, self.lora.terms(input), [input])
