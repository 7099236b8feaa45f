"""nn.Bilinear."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.layer_cases.case import LayerCase, Matrix

FIRST, SECOND, OUT = 4, 5, 6


class Weighted(nn.Bilinear):
    """Does something to what the forward that it inherits gives."""

    def forward(self, input1, input2):
        return 2 * super().forward(input1, input2)


class Outer(nn.Bilinear):
    """Reads its weight itself."""

    def forward(self, input1, input2):
        return torch.einsum("...i,oij,...j->...o", input1, self.weight, input2)


def case(*leading, cls=nn.Bilinear, sizes=(FIRST, SECOND, OUT), dtype=torch.float32, **arguments):
    def make():
        inputs = [torch.randn(*leading, size, dtype=dtype) for size in sizes[:2]]
        return cls(*sizes, **arguments).to(dtype), inputs, {}

    return make


CASES = {
    "batch": case(3),
    "no-bias": case(3, bias=False),
    "more-dimensions": case(2, 3, 2),
    "more-dimensions-no-bias": case(2, 3, bias=False),
    "vector": case(),
    "one-output": case(3, sizes=(4, 5, 1)),
    "one-feature": case(3, sizes=(1, 5, 2)),
    "fp64": case(3, dtype=torch.float64),
    "bf16": case(2, 3, dtype=torch.bfloat16),
    "super": case(3, cls=Weighted),
    "own": case(3, cls=Outer, bias=False),
}


def matrices(plain: nn.Bilinear) -> dict[str, Matrix]:
    """The weight as a matrix over all pairs of the two inputs."""
    shape = (plain.out_features, plain.in1_features * plain.in2_features)
    return {"lora.default": Matrix("weight", shape, lambda delta: delta.view(plain.weight.shape))}


LAYER_CASES = {f"bilinear-{name}": LayerCase(make, matrices) for name, make in CASES.items()}
