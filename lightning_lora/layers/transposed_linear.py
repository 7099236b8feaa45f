"""LoRA for the linear map with a transposed weight that Hugging Face's GPT-2 calls ``Conv1D``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.weight_view import Part


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
