"""LoRA for linear layers: ``nn.Linear``, Hugging Face's ``Conv1D`` and quantized layers.

``Conv1D`` keeps its weight transposed. Quantized layers, as those of bitsandbytes, have no matrix that could be read:
the adapter adds its term to their output. They are recognised by the library that their class comes from, which is not
imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import add_pair, linear
from lightning_lora.ops.shared_input import SharedInputGroup
from lightning_lora.torch_internals import has_module_hooks


class LinearAdapter(Adapter):
    """Adds ``scale * B A x``: a pair of :func:`lightning_lora.ops.linear.linear`."""

    shared_input: SharedInputGroup | None = None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output ``y`` of shape ``(..., out_features)`` plus the low-rank term for its input ``x``."""
        return add_pair(y, x, self)

    def operands(self) -> tuple[Tensor, Tensor]:
        """A and B for the fused op, which does not call ``forward``."""
        return self.A, self.B

    def placed_B(self, out_features: int) -> Tensor:
        """B of shape ``(out_features, r)``, zero in the rows that are not adapted."""
        return self.part.place_rows(self.B, out_features)

    def dropout_probability(self) -> float:
        """The probability of dropping an element of the input of A in this call."""
        return self.dropout if self.training else 0.0

    def is_hooked(self) -> bool:
        """Whether a hook expects calls of this module; the fused op makes none."""
        return has_module_hooks(self)


class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with adapters: ``W0 x + b + scale * B A x``."""

    lora_original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return linear(input, self.weight, self.bias, self.lora.active_pairs())  # type: ignore[arg-type]


class LoRAQuantizedLinear(LoRALayer, nn.Linear):
    """Mixed into a linear layer that keeps its weight in few bits: A and B are in fp32 beside it."""

    lora_original_class = nn.Linear
    lora_adapter_class = LinearAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The class's own map, then each adapter's term."""
        y: Tensor = super().forward(input)
        for adapter in self.lora.active_pairs():
            y = adapter(y, input)
        return y


class TransposedLinear(LoRALayer):
    """Mixed into the class found in the model, so that transformers is never imported; its weight is ``(in, out)``."""

    lora_adapter_class = LinearAdapter

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """One matrix, kept the other way round."""
        return [WeightPart(transposed=True)]

    def forward(self, x: Tensor) -> Any:
        """The frozen map, then each adapter's term."""
        y = super().forward(x)
        for adapter in self.lora.active_pairs():
            y = adapter(y, x)
        return y


def conv1d_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class named ``Conv1D`` that ``cls`` is or derives from, told from ``nn.Conv1d`` by its case and its bases."""
    return next((base for base in cls.__mro__ if base.__name__ == "Conv1D" and issubclass(base, nn.Module)), None)


def conv1d_class(root: type[nn.Module]) -> type[LoRALayer]:
    """The adapted class for that ``Conv1D``."""
    return type("LoRAConv1D", (TransposedLinear, root), {"lora_original_class": root, "__module__": __name__})


def is_quantized_class(cls: type[nn.Module]) -> bool:
    """Whether layers of class ``cls`` keep a weight that is no matrix."""
    known = any(base.__module__.partition(".")[0] == "bitsandbytes" for base in cls.__mro__)
    return known and issubclass(cls, nn.Linear)  # its embeddings are plain
