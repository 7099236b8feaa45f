"""LoRA for ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: their forward runs on merged weights."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.layers.merged_forward import MergedForward
from lightning_lora.layers.weight_view import WeightPart


class LoRACell(MergedForward):
    """Mixin for a recurrent cell: the weights of the input and of the state have separate pairs."""

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """Every weight matrix, by its name in torch."""
        matrices = ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)
        return [WeightPart(key, key) for key, parameter in matrices if parameter.dim() == 2]


class LoRARecurrent(LoRACell):
    """Mixin for a recurrent layer, which reads its weights from a list."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def lora_set_parameter(self, key: str, value: Tensor) -> None:
        """Replace the parameter in that list too."""
        super().lora_set_parameter(key, value)
        self._flat_weights[self._flat_weights_names.index(key)] = value
