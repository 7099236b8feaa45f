"""LoRA for ``nn.Bilinear``: its weight is a matrix over all products of two input elements."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.mixed.terms import add_terms
from lightning_lora.ops.linear import Coefficient, weighed


class BilinearAdapter(Adapter):
    """Adds ``scale * B h`` with ``h_k = x1^T A_k x2``; A is ``(r, in1 * in2)``, B ``(out_features, r)``."""

    def forward(self, y: Tensor, x1: Tensor, x2: Tensor, coefficient: Coefficient = None) -> Tensor:
        """The base output ``y`` of shape ``(..., out_features)`` plus the low-rank term for the two inputs."""
        A = self.A.to(x1.dtype).view(self.r, x1.shape[-1], x2.shape[-1])
        hidden = weighed(F.bilinear(self.apply_dropout(x1), x2, A), coefficient)  # (..., r)
        return y + F.linear(hidden, (self.scale * self.B).to(hidden.dtype)).to(y.dtype)


class LoRABilinear(LoRALayer, nn.Bilinear):
    """An ``nn.Bilinear`` with adapters."""

    original_class = nn.Bilinear
    lora_adapter_class = BilinearAdapter

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The base output plus the low-rank term of each adapter."""
        y = super().forward(input1, input2)
        return add_terms(y, self.lora.terms(input1), [input1, input2])
