"""Names and shapes as modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.cli.meta_model import is_embedding, skeleton


def test_names_and_shapes_stay():
    shapes = {
        "a.b.weight": (3, 4),
        "a.b.bias": (3,),
        "a.weight": (5, 6),
        "embed.weight": (7, 8),
        "x": (2,),
        "n.weight": (9,),
    }
    model = skeleton(shapes | {"e.experts": (2, 3, 4)})
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes | {"e.experts": (2, 3, 4)}
    assert all(p.is_meta for p in model.parameters())
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert (kinds["a.b"], kinds["a"], kinds["embed"], kinds["n"]) == (nn.Linear, nn.Linear, nn.Embedding, nn.Module)
    assert (model.a.b.in_features, model.a.b.out_features) == (4, 3)


def test_transposed_maps():
    model = skeleton({"fc.weight": (3, 4)}, transposed=True)
    assert (model.fc.in_features, model.fc.out_features) == (3, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tok_embeddings", True),
        ("decoder.embed_positions", True),
        ("embed_out", False),
        ("patch_embed.proj", False),
        ("q_proj", False),
    ],
)
def test_embeddings_by_name(name, expected):
    assert is_embedding(name) is expected


def test_nothing_is_allocated():
    assert skeleton({"big.weight": (2**20, 2**20)}).big.weight.device == torch.device("meta")
