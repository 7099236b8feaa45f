"""LoRA for ``nn.Linear`` and its sub-classes, quantized ones too."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.layer import LoRALayer
from lightning_lora.op import add_low_rank, frozen_linear


class LinearAdapter(Adapter):
    """Adds ``scale * B A x``."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output ``y`` of shape ``(..., out_features)`` with the term for its input ``x``."""
        return add_low_rank(y, self.dropped(x), self.A, self.part.placed(self.B, y.shape[-1]), self.scale)


class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with adapters: ``W0 x + b + scale * B A x``."""

    lora_original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The frozen map, then each adapter's term."""
        y = frozen_linear(input, self.weight, self.bias)
        for adapter in self.lora.active():
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
