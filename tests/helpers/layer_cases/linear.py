"""nn.Linear, nn.Embedding, nn.Conv1d, 2d and 3d, Hugging Face's Conv1D, and subclasses of theirs."""

from __future__ import annotations

import copy

from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from tests.helpers.layer_cases.case import LayerCase, Matrix
from tests.helpers.oracles import CASES


def matrices(plain: nn.Module) -> dict[str, Matrix]:
    weight = plain.weight
    if isinstance(plain, (nn.Embedding, Conv1D)):  # these multiply from the other side
        return {"lora.default": Matrix("weight", (weight.shape[1], weight.shape[0]), lambda delta: delta.t())}
    shape = (weight.shape[0], weight[0].numel())
    return {"lora.default": Matrix("weight", shape, lambda delta: delta.reshape(weight.shape))}


def call(plain, sums, inputs, others):
    """`plain` with `sums` for its weight and a dense gradient."""
    twin = copy.deepcopy(plain)
    twin.sparse = False
    return functional_call(twin, sums, inputs, others)


def layer_case(name, make, make_input):
    def build():
        layer, x = make(), make_input()
        return layer, [x.to(layer.weight.dtype) if x.is_floating_point() else x], {}

    return LayerCase(build, matrices, call, gradients=name != "embedding-by-frequency")


LAYER_CASES = {name: layer_case(name, *case) for name, case in CASES.items()}
