"""LoRA for convolutions and transposed convolutions, with any stride, padding, dilation and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer, parameter_of
from lightning_lora.layers.mixed.terms import add_terms
from lightning_lora.layers.sums.reading import summed_weight
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.linear import Coefficient, weighed


class ConvAdapter(Adapter):
    """Adds a convolution with A, r channels per group, followed by a pointwise convolution with B.

    A is ``(r, in_channels / groups * kernel)`` and B ``(out_channels, r)``: ``B A`` has the shape of the weight as a
    matrix, for any number of groups.
    """

    def forward(self, y: Tensor, x: Tensor, layer: LoRAConv, coefficient: Coefficient = None) -> Tensor:
        """The base output ``y`` plus the low-rank term for the input ``x``."""
        kernel = parameter_of(layer).shape[1:]  # (in_channels / groups, *kernel_size)
        A = self.A.to(x.dtype).view(-1, *kernel)
        if layer.groups > 1:
            A = A.repeat(layer.groups, *[1] * len(kernel))
        B = self.B if self.scale == 1 else self.scale * self.B  # one kernel less
        B = B.to(x.dtype).view(*B.shape, *[1] * (len(kernel) - 1))
        hidden = layer._conv_forward(self.apply_dropout(x), A, None)  # (batch, groups * r, ...)
        hidden = weighed(hidden, coefficient)
        return y + layer.lora_pointwise(hidden, B, groups=layer.groups).to(y.dtype)


class LoRAConv(LoRALayer):
    """Base of the adapted convolutions."""

    lora_adapter_class = ConvAdapter
    groups: int
    bias: Tensor | None
    lora_pointwise: Callable[..., Tensor]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """The base output plus the low-rank term of each adapter, or the convolution with the summed weight."""
        weight = summed_weight(self, input)
        if weight is not None:
            return self._conv_forward(input, weight, self.bias)
        y: Tensor = super().forward(input)
        return add_terms(y, self.lora.terms(input, size=samples_in(self, input)), [input], self)


def samples_in(layer: LoRALayer, x: Tensor) -> int:
    """The number of samples in the input ``x`` of a convolution, which has no batch dimension for a single one."""
    return x.shape[0] if x.dim() == parameter_of(layer).dim() else 1


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """An ``nn.Conv1d`` with adapters."""

    original_class = nn.Conv1d
    lora_pointwise = staticmethod(nn.functional.conv1d)


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """An ``nn.Conv2d`` with adapters."""

    original_class = nn.Conv2d
    lora_pointwise = staticmethod(nn.functional.conv2d)


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """An ``nn.Conv3d`` with adapters."""

    original_class = nn.Conv3d
    lora_pointwise = staticmethod(nn.functional.conv3d)


class TransposedConvAdapter(Adapter):
    """Adds a pointwise convolution with A, r channels per group, followed by a transposed convolution with B.

    A is ``(r, in_channels)`` and B ``(out_channels / groups * kernel, r)``: ``B A`` has the shape of the transposed
    weight as a matrix, for any number of groups.
    """

    def forward(
        self,
        y: Tensor,
        x: Tensor,
        layer: LoRAConvTranspose,
        output_padding: list[int],
        coefficient: Coefficient = None,
    ) -> Tensor:
        """The base output ``y`` plus the low-rank term for the input ``x``."""
        kernel = parameter_of(layer).shape[1:]  # (out_channels / groups, *kernel_size)
        ones = [1] * (len(kernel) - 1)
        A = self.A.to(x.dtype).view(self.r, layer.groups, -1).transpose(0, 1)  # (groups, r, in_channels / groups)
        A = A.reshape(layer.groups * self.r, -1, *ones)
        hidden = weighed(layer.lora_pointwise(self.apply_dropout(x), A, groups=layer.groups), coefficient)
        B = (self.scale * self.B).to(x.dtype).t().reshape(self.r, *kernel).repeat(layer.groups, *[1] * len(kernel))
        arguments = (layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
        return y + layer.lora_transposed(hidden, B, None, *arguments).to(y.dtype)


class LoRAConvTranspose(LoRALayer, nn.modules.conv._ConvTransposeNd):
    """Base of the adapted transposed convolutions."""

    lora_adapter_class = TransposedConvAdapter
    lora_pointwise: Callable[..., Tensor]
    lora_transposed: Callable[..., Tensor]

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """One matrix: torch stores the weight of a transposed convolution as ``(in_channels, ...)``."""
        return [WeightPart(transposed=True)]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Any:
        """The base output plus the low-rank term of each adapter, or the convolution with the summed weight."""
        weight = summed_weight(self, input)
        if weight is not None:
            arguments = (self.stride, self.padding, self._padding_of_output(input, output_size), self.groups)
            return self.lora_transposed(input, weight, self.bias, *arguments, self.dilation)
        y = super().forward(input, output_size)
        terms = self.lora.terms(input, size=samples_in(self, input))
        return add_terms(y, terms, [input], self, self._padding_of_output(input, output_size)) if terms else y

    def _padding_of_output(self, input: Tensor, output_size: list[int] | None) -> list[int]:
        stride, dilation, kernel = list(self.stride), list(self.dilation), list(self.kernel_size)
        sizes: Any = list(self.padding)  # numbers: a transposed convolution accepts no padding by name
        return self._output_padding(input, output_size, stride, sizes, kernel, len(kernel), dilation)


class LoRAConvTranspose1d(LoRAConvTranspose, nn.ConvTranspose1d):
    """An ``nn.ConvTranspose1d`` with adapters."""

    original_class = nn.ConvTranspose1d
    lora_pointwise = staticmethod(F.conv1d)
    lora_transposed = staticmethod(F.conv_transpose1d)


class LoRAConvTranspose2d(LoRAConvTranspose, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` with adapters."""

    original_class = nn.ConvTranspose2d
    lora_pointwise = staticmethod(F.conv2d)
    lora_transposed = staticmethod(F.conv_transpose2d)


class LoRAConvTranspose3d(LoRAConvTranspose, nn.ConvTranspose3d):
    """An ``nn.ConvTranspose3d`` with adapters."""

    original_class = nn.ConvTranspose3d
    lora_pointwise = staticmethod(F.conv3d)
    lora_transposed = staticmethod(F.conv_transpose3d)
