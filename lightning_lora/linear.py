"""LoRA for ``nn.Linear`` and its sub-classes, quantized ones too."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.layer import LoRALayer
from lightning_lora.op import FrozenWithLowRank, add_low_rank, frozen_linear, in_one


class LinearAdapter(Adapter):
    """Adds ``scale * B A x``."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output ``y`` of shape ``(..., out_features)`` with the term for its input ``x``."""
        return add_low_rank(y, self.dropped(x), self.A, self.part.placed(self.B, y.shape[-1]), self.scale)

    def with_frozen(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with the term, of one node where that serves."""
        if self._is_watched() or (self.dropout and self.training) or not in_one(x, weight, bias, self.A, self.B):
            term: Tensor = self(frozen_linear(x, weight, bias), x)
            return term
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = FrozenWithLowRank.apply(rows, weight, bias, self.A, self.B, self.scale)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

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
