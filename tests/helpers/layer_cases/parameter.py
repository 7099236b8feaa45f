"""Parameters by name, of any module, and stacks of experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.layer_cases.case import LayerCase, Matrix


class Prompted(nn.Module):
    """A matrix of its own, and one of a part that only others read."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 6))
        self.inner = nn.Module()
        self.inner.mix = nn.Parameter(torch.randn(6, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.helped(x) + self.bias

    def helped(self, x):
        return x @ self.mix @ self.inner.mix


class Experts(nn.Module):
    """Indexes its stacks, one expert after the other."""

    def __init__(self, experts=3, wide=12, dim=4):
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, wide, dim)),
            nn.Parameter(torch.randn(experts, dim, wide)),
        )

    def forward(self, x):
        return sum(F.linear(F.linear(x, self.up[e]).relu(), self.down[e]) for e in range(len(self.up)))


class Transposed(Experts):
    """Keeps them as (in, out), and says so by its biases."""

    def __init__(self):
        nn.Module.__init__(self)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 12)), nn.Parameter(torch.randn(3, 12, 4))
        self.up_bias, self.down_bias = nn.Parameter(torch.zeros(3, 12)), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        hidden = torch.bmm(x.expand(3, -1, -1), self.up).relu()
        return torch.einsum("ebw,ewd->bd", hidden, self.down)


class Gathering(Experts):
    """Takes a matrix for each row."""

    def forward(self, x):
        which = torch.arange(len(x)) % len(self.up)
        hidden = torch.bmm(self.up[which], x.unsqueeze(-1)).relu()
        return (self.down[which] @ hidden).squeeze(-1)


class Grouping(Experts):
    """The grouped product of torch, for rows sorted by expert."""

    def forward(self, x):
        hidden = grouped(x, self.up.transpose(-2, -1)).relu()
        return grouped(hidden, self.down.mT)


def grouped(x, weights):
    """The first row for the first expert, none for the second, the rest for the third; torch has no fp64 for it."""
    if x.dtype == torch.float64:
        return torch.cat([x[:1] @ weights[0], x[1:] @ weights[2]])
    return F.grouped_mm(x, weights, offs=torch.tensor([1, 1, len(x)], dtype=torch.int32))


# The module, and which of its parameters are adapted.
CASES = {
    "matrices": (Prompted, ["mix", "inner.mix"]),
    "indexed": (Experts, ["up", "down"]),
    "transposed": (Transposed, ["up", "down"]),
    "gathered": (Gathering, ["up", "down"]),
    "grouped": (Grouping, ["up", "down"]),
}


def matrices(plain: nn.Module) -> dict[str, Matrix]:
    names = ["mix", "inner.mix"] if isinstance(plain, Prompted) else ["up", "down"]
    return {prefix(name): matrix(plain, name) for name in names}


def prefix(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.lora.default.{leaf}" if owner else f"lora.default.{leaf}"


def matrix(plain: nn.Module, name: str) -> Matrix:
    shape = tuple(plain.get_parameter(name).shape)
    if isinstance(plain, Transposed):
        return Matrix(name, (shape[0], shape[2], shape[1]), lambda delta: delta.mT)
    return Matrix(name, shape)


def layer_case(make, names):
    def build():
        return make(), [torch.randn(5, 4)], {}

    return LayerCase(build, matrices, targets=[f"layer.{name}" for name in names])


LAYER_CASES = {f"parameter-{name}": layer_case(*case) for name, case in CASES.items()}
