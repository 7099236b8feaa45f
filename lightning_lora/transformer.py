"""``nn.TransformerEncoder`` and its layers: in evaluation torch reads the weights of the layers inside, in one kernel.

What those layers do is passed by then. So where adapters act inside, the fast path is closed, or it gets their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_lora.layer import LoRALayer
from lightning_lora.on_weight import acts, may_sum, summed


class Gate:
    """An attribute whose truth opens a fast path of torch's: zero where ``closed`` says so.

    On the class it comes before the attribute of the instance, which stays what it is.
    """

    def __init__(self, name: str, closed: Callable[[Any], bool]) -> None:
        self.name, self.closed = name, closed

    def __get__(self, module: Any, owner: Any = None) -> Any:
        """The attribute of the instance, or zero."""
        if module is None:
            return self
        return 0 if self.closed(module) else module.__dict__[self.name]

    def __set__(self, module: Any, value: Any) -> None:
        """As on the plain module."""
        module.__dict__[self.name] = value


class LoRATransformerEncoderLayer(LoRALayer, nn.TransformerEncoderLayer):
    """An ``nn.TransformerEncoderLayer`` with adapters inside; it has none of its own."""

    original_class = nn.TransformerEncoderLayer
    activation_relu_or_gelu = Gate("activation_relu_or_gelu", acts)

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the plain layer."""
        if not acts(self) or not may_sum(self, src):
            return super().forward(src, *args, **kwargs)
        with summed(self):
            return super().forward(src, *args, **kwargs)


class LoRATransformerEncoder(LoRALayer, nn.TransformerEncoder):
    """An ``nn.TransformerEncoder`` with adapters inside: nested tensors are made only where its layers take them."""

    original_class = nn.TransformerEncoder
    use_nested_tensor = Gate(
        "use_nested_tensor", lambda encoder: acts(encoder) and not may_sum(encoder, next(encoder.parameters()))
    )
