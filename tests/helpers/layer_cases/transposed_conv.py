"""nn.ConvTranspose1d, 2d and 3d."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.layer_cases.case import LayerCase, Matrix


class Scaled(nn.ConvTranspose2d):
    """Does something to what the forward that it inherits gives."""

    def forward(self, x, output_size=None):
        return super().forward(x, output_size) * 0.5


class Centred(nn.ConvTranspose1d):
    """Reads its weight itself."""

    def forward(self, x):
        return F.conv_transpose1d(x, self.weight - self.weight.mean(), self.bias, self.stride)


def case(cls, shape, sizes=(4, 6, 3), dtype=torch.float32, call=None, **arguments):
    return lambda: (cls(*sizes, **arguments).to(dtype), [torch.randn(shape).to(dtype)], call or {})


ONE, TWO, THREE = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
CASES = {
    "1d": case(ONE, (2, 4, 7)),
    "1d-unbatched": case(ONE, (4, 7), stride=2),
    "1d-stride": case(ONE, (2, 4, 7), stride=3, padding=1, output_padding=2),
    "1d-dilation": case(ONE, (2, 4, 7), dilation=2, padding=2, bias=False),
    "1d-groups": case(ONE, (2, 4, 7), groups=2, stride=2),
    "1d-depthwise": case(ONE, (2, 4, 7), sizes=(4, 8, 3), groups=4),
    "1d-output-size": case(ONE, (2, 4, 7), stride=2, call={"output_size": [16]}),
    "2d": case(TWO, (2, 4, 5, 6)),
    "2d-no-bias": case(TWO, (2, 4, 5, 6), bias=False),
    "2d-pointwise": case(TWO, (2, 4, 5, 6), sizes=(4, 6, 1)),
    "2d-unbatched": case(TWO, (4, 5, 6), groups=2),
    "2d-stride": case(TWO, (2, 4, 5, 6), sizes=(4, 6, (3, 2)), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    "2d-dilation": case(TWO, (2, 4, 5, 6), dilation=(1, 2), padding=(0, 1), stride=2),
    "2d-groups": case(TWO, (2, 4, 5, 6), groups=2, stride=2, output_padding=1, dilation=2),
    "2d-output-size": case(TWO, (2, 4, 5, 6), stride=2, padding=1, call={"output_size": [10, 11]}),
    "2d-output-size-in-full": case(TWO, (2, 4, 5, 6), stride=2, groups=2, call={"output_size": (2, 6, 12, 13)}),
    "2d-channels-last": lambda: (TWO(4, 6, 3).to(memory_format=torch.channels_last), [torch.randn(2, 4, 5, 6)], {}),
    "3d": case(THREE, (2, 2, 3, 4, 3), sizes=(2, 4, 2)),
    "3d-all": case(
        THREE, (2, 2, 3, 4, 3), sizes=(2, 4, (2, 3, 2)), stride=(2, 1, 3), padding=1, groups=2, output_padding=(1, 0, 2)
    ),
    "3d-dilation": case(THREE, (1, 2, 3, 3, 3), sizes=(2, 4, 2), dilation=(1, 2, 1), bias=False),
    "3d-output-size": case(THREE, (1, 2, 3, 3, 3), sizes=(2, 4, 2), stride=2, call={"output_size": [6, 7, 7]}),
    "1d-fp64": case(ONE, (2, 4, 7), dtype=torch.float64, groups=2, stride=2),
    "2d-fp64": case(TWO, (2, 4, 5, 6), dtype=torch.float64, stride=2),
    "2d-bf16": case(TWO, (2, 4, 5, 6), dtype=torch.bfloat16, stride=2),
    "1d-bf16-groups": case(ONE, (2, 4, 7), dtype=torch.bfloat16, groups=2, bias=False),
    "super": case(Scaled, (2, 4, 5, 6), stride=2, call={"output_size": [12, 13]}),
    "own": case(Centred, (2, 4, 7), stride=2),
}


def matrices(plain: nn.Module) -> dict[str, Matrix]:
    """The weight has the shape `(in_channels, out_channels / groups, *kernel_size)`."""
    shape = (plain.weight[0].numel(), plain.in_channels)
    return {"lora.default": Matrix("weight", shape, lambda delta: delta.t().reshape(plain.weight.shape))}


LAYER_CASES = {f"transposed-conv-{name}": LayerCase(make, matrices) for name, make in CASES.items()}
