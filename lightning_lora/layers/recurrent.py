"""LoRA for ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: every weight matrix, on the weight."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.layers.merged_forward import MergedForward
from lightning_lora.layers.weight_view import WeightPart


class LoRACell(MergedForward):
    """Mixed into a recurrent cell: the weight of the input and that of the state are adapted apart."""

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """Every weight matrix, by torch's own name for it."""
        matrices = ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)
        return [WeightPart(key, key) for key, parameter in matrices if parameter.dim() == 2]


class LoRARecurrent(LoRACell):
    """Mixed into a recurrent layer, which reads its weights from a list of its own."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def lora_set_parameter(self, key: str, value: Tensor) -> None:
        """In that list too."""
        super().lora_set_parameter(key, value)
        self._flat_weights[self._flat_weights_names.index(key)] = value
