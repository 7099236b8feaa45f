"""nn.EmbeddingBag: by rows or by offsets, with weights, padding, max_norm and sparse gradients."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from tests.helpers.layer_cases.case import LayerCase, Matrix

NUMBER, WIDTH = 11, 6
BAGS = torch.tensor([[1, 5, 5, 0], [10, 3, 1, 3], [5, 5, 5, 5]])
FLAT = torch.tensor([1, 5, 5, 0, 10, 3, 1, 3])
OFFSETS = torch.tensor([0, 3, 3, 5])  # the second bag is empty


class Halved(nn.EmbeddingBag):
    """Does something to what the forward that it inherits gives."""

    def forward(self, input, offsets=None, per_sample_weights=None):
        return super().forward(input, offsets, per_sample_weights) * 0.5


class Summed(nn.EmbeddingBag):
    """Reads its weight itself."""

    def forward(self, input):
        return self.weight[input].sum(1)


def case(*inputs, weighted=False, dtype=torch.float32, cls=nn.EmbeddingBag, **arguments):
    def make():
        layer = cls(NUMBER, WIDTH, **arguments).to(dtype)
        given = list(inputs) or [BAGS]
        weights = {"per_sample_weights": torch.randn(given[0].shape).to(dtype)} if weighted else {}
        return layer, given, weights

    return make


CASES = {
    "mean": case(),
    "sum": case(mode="sum"),
    "max": case(mode="max"),
    "mean-offsets": case(FLAT, OFFSETS),
    "sum-offsets": case(FLAT, OFFSETS, mode="sum"),
    "max-offsets": case(FLAT, OFFSETS, mode="max"),
    "mean-last-offset": case(FLAT, torch.tensor([0, 3, 3, 5, 8]), include_last_offset=True),
    "max-last-offset": case(FLAT, torch.tensor([0, 3, 3, 8]), include_last_offset=True, mode="max"),
    "weighted": case(mode="sum", weighted=True),
    "weighted-offsets": case(FLAT, OFFSETS, mode="sum", weighted=True),
    "weighted-padding": case(mode="sum", weighted=True, padding_idx=5),
    "mean-padding": case(padding_idx=5),
    "sum-padding-from-the-end": case(mode="sum", padding_idx=-1),
    "max-padding": case(mode="max", padding_idx=5),
    "mean-padding-offsets": case(FLAT, OFFSETS, padding_idx=5),
    "mean-max-norm": case(max_norm=1.0),
    "sum-max-norm-l1": case(mode="sum", max_norm=2.0, norm_type=1.0, padding_idx=0),
    "max-max-norm": case(mode="max", max_norm=1.0),
    "weighted-max-norm": case(mode="sum", max_norm=1.0, weighted=True),
    "sum-sparse": case(mode="sum", sparse=True),
    "mean-sparse": case(FLAT, OFFSETS, sparse=True),
    "sum-by-frequency": case(mode="sum", scale_grad_by_freq=True),
    "mean-by-frequency": case(FLAT, OFFSETS, scale_grad_by_freq=True),
    "fp64": case(mode="sum", dtype=torch.float64, weighted=True),
    "mean-fp64": case(dtype=torch.float64),
    "bf16": case(mode="mean", dtype=torch.bfloat16),
    "weighted-bf16": case(mode="sum", dtype=torch.bfloat16, weighted=True),
    "max-bf16": case(mode="max", dtype=torch.bfloat16),
    "fp16": case(mode="sum", dtype=torch.float16, padding_idx=1),
    "super": case(cls=Halved, mode="sum", weighted=True),
    "own": case(cls=Summed),
}


def matrices(plain: nn.EmbeddingBag) -> dict[str, Matrix]:
    """The row at the padding index has no gradient, as in the plain layer."""

    def rows(delta):
        if plain.padding_idx is None:
            return delta.t()
        return torch.where((torch.arange(NUMBER) == plain.padding_idx)[:, None], delta.t().detach(), delta.t())

    return {"lora.default": Matrix("weight", (WIDTH, NUMBER), rows)}


def call(plain, sums, inputs, others):
    """`plain` with `sums` for its weight and a dense gradient, which passes `max_norm` as if it were not there."""
    twin, weight = copy.deepcopy(plain), sums["weight"]
    if plain.max_norm is not None:
        weight = weight + (shortened(weight.detach(), plain) - weight.detach())
    twin.max_norm, twin.sparse = None, False
    return functional_call(twin, {"weight": weight}, inputs, others)


def shortened(weight, plain):
    """Rows cut to ``max_norm``, each by the gradient-free factor that torch takes."""
    norm = weight.detach().norm(plain.norm_type, dim=1, keepdim=True)
    return torch.where(norm > plain.max_norm, weight * plain.max_norm / (norm + 1e-7), weight)


LAYER_CASES = {
    f"embedding-bag-{name}": LayerCase(make, matrices, call, gradients="frequency" not in name)
    for name, make in CASES.items()
}
