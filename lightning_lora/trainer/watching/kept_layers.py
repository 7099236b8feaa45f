"""Adapted layers that other code replaces during a run: without an error their adapters would be lost.

``model.dequantize()`` of transformers replaces each quantized layer by a plain linear one.
"""

from __future__ import annotations

from torch import nn

from lightning_lora import names
from lightning_lora.layers.adapted import Adapted
from lightning_lora.names import counted
from lightning_lora.trainer.imports import MisconfigurationException


class KeptLayers:
    """The adapted layers of a module, from the start of a run on.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = {name: layer for name, layer in names.named_modules(module) if isinstance(layer, Adapted)}

    def check(self) -> None:
        """Raise if a layer was replaced by one that is not adapted. A layer that was taken out is the user's choice.

        Raises:
            MisconfigurationException: naming the first one.
        """
        now = dict(names.named_modules(self.module))
        lost = [name for name, old in self.layers.items() if _is_lost(old, now.get(name))]
        if lost:
            raise MisconfigurationException(
                f"`{lost[0]}` was replaced during the run by a plain {type(now[lost[0]]).__name__} "
                f"({counted(len(lost), 'adapted layer')} in all), which has no adapter: what was trained is lost. "
                "Replace layers before the run, or in `setup`. Leave out `dequantize()` of a quantized model: "
                "LoRACallback(dequantize=True) merges into the dequantized weights at the end."
            )


def _is_lost(old: nn.Module, new: nn.Module | None) -> bool:
    return new is not None and new is not old and not isinstance(new, Adapted)
