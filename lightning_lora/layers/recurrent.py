"""LoRA for ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: their forward runs on merged weights.

Where gradients are enabled and the weight's side is faster, all weights of a layer are summed in a few launches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lora.layers.merged_forward import LOCK, MergedForward, use_weights
from lightning_lora.layers.restoring import Restoring
from lightning_lora.layers.sums.reading import summed_weights
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.torch_internals import any_autocast_enabled


class LoRACell(MergedForward):
    """Mixin for a recurrent cell: the weights of the input and of the state have separate pairs."""

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """Every weight matrix, by its name in torch."""
        matrices = ((key, parameter) for key, parameter in module._parameters.items() if parameter is not None)
        return [WeightPart(key, key) for key, parameter in matrices if parameter.dim() == 2]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on the sums of the weights where gradients are enabled, else on merged weights.

        Autocast casts a sum, but torch's recurrent layers need all their parameters in one dtype.
        """
        if not self.lora.sums or not torch.is_grad_enabled() or torch.compiler.is_compiling() or any_autocast_enabled():
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        with LOCK:
            sums = summed_weights(self, x.data if isinstance(x, PackedSequence) else x)
            if sums:
                with Restoring(partial(use_weights, self, sums)):
                    return super(MergedForward, self).forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class LoRARecurrent(LoRACell):
    """Mixin for a recurrent layer, which reads its weights from a list."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def lora_set_parameter(self, key: str, value: Tensor) -> None:
        """Replace the parameter in that list too."""
        super().lora_set_parameter(key, value)
        self._flat_weights[self._flat_weights_names.index(key)] = value
