"""LoRA for convolutions of every kind, whatever their stride, padding, dilation and groups."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of


class ConvAdapter(Adapter):
    """Adds a convolution with A, of r channels in each group, followed by a lora_pointwise one with B.

    A is ``(r, in_channels / groups * kernel)`` and B ``(out_channels, r)``, so that ``B A`` has the shape of the weight
    seen as a matrix, for any number of groups.
    """

    def forward(self, y: Tensor, x: Tensor, layer: LoRAConv) -> Tensor:
        """The output ``y`` with the term for the input ``x``."""
        kernel = parameter_of(layer).shape[1:]  # (in_channels / groups, *kernel_size)
        A = self.A.to(x.dtype).view(-1, *kernel)
        if layer.groups > 1:
            A = A.repeat(layer.groups, *[1] * len(kernel))
        B = self.B if self.scale == 1 else self.scale * self.B  # as in `op.add_hidden`: fewer kernels
        B = B.to(x.dtype).view(*B.shape, *[1] * (len(kernel) - 1))
        hidden = layer._conv_forward(self.dropped(x), A, None)  # (batch, groups * r, ...)
        return y + layer.lora_pointwise(hidden, B, groups=layer.groups).to(y.dtype)


class LoRAConv(LoRALayer):
    """What the three have in common."""

    lora_adapter_class = ConvAdapter
    groups: int
    lora_pointwise: Callable[..., Tensor]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """The frozen convolution, then each adapter's term."""
        y: Tensor = super().forward(input)
        for adapter in self.lora.active():
            y = adapter(y, input, self)
        return y


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """An ``nn.Conv1d`` with adapters."""

    lora_original_class = nn.Conv1d
    lora_pointwise = staticmethod(nn.functional.conv1d)


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """An ``nn.Conv2d`` with adapters."""

    lora_original_class = nn.Conv2d
    lora_pointwise = staticmethod(nn.functional.conv2d)


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """An ``nn.Conv3d`` with adapters."""

    lora_original_class = nn.Conv3d
    lora_pointwise = staticmethod(nn.functional.conv3d)
