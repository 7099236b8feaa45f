"""What an entry of a batch means: names, indices, for each sample or for all; anything else is one clear error."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_lora.trainer.several.route import Route

NAMES = ["fr", "de", "it"]
x = torch.zeros(3, 4)
Pair = namedtuple("Pair", "x task")


@pytest.mark.parametrize(
    ("key", "batch", "names"),
    [
        ("task", {"x": x, "task": ["fr", "de", "fr"]}, ["fr", "de", "fr"]),
        ("task", {"x": x, "task": ("de", "de", "it")}, ["de", "de", "it"]),
        ("task", {"x": x, "task": torch.tensor([2, 0, 1])}, ["it", "fr", "de"]),
        ("task", {"x": x, "task": np.array([2, 0, 1])}, ["it", "fr", "de"]),
        ("task", {"x": x, "task": [torch.tensor(1), 0, "it"]}, ["de", "fr", "it"]),
        ("task", {"x": x, "task": torch.tensor(1)}, "de"),
        ("task", {"x": x, "task": "it"}, "it"),
        ("task", {"x": x, "task": 0}, "fr"),
        ("task", SimpleNamespace(x=x, task=["fr", "de", "fr"]), ["fr", "de", "fr"]),
        ("task", Pair(x, torch.tensor([0, 0, 0])), ["fr", "fr", "fr"]),
        (1, [x, torch.tensor([0, 1, 2])], NAMES),
        ("1", (x, torch.tensor([0, 1, 2])), NAMES),
        (0, {0: "de", "x": x}, "de"),
        ("task", {"tokens": {"ids": x, "mask": x}, "task": ["fr", "de", "fr"]}, ["fr", "de", "fr"]),
        ("task", {"texts": "not tensors", "task": ["fr", "de"]}, ["fr", "de"]),
    ],
)
def test_an_entry_gives_names(key, batch, names):
    assert Route(key, NAMES).names_in(batch) == names


def test_the_index_of_a_data_loader_takes_the_place_of_an_entry():
    assert Route("dataloader", NAMES).names_in(x, 2) == "it"
    with pytest.raises(ValueError, match=r"`route='dataloader'` gives 3 for this data loader.*indices 0 to 2"):
        Route("dataloader", NAMES).names_in(x, 3)


@pytest.mark.parametrize(
    ("key", "batch", "message"),
    [
        (
            "task",
            {"x": x, "y": x},
            r"`route='task'` must be an entry of every batch.* with the keys 'x', 'y'",
        ),
        ("task", [x, x], r"must be an entry of every batch, .* but the batch is a list of 2"),
        ("index", [x, x], r"must be an entry of every batch"),  # a list has a method of that name
        (2, [x, x], r"`route=2` must be an entry of every batch"),
        ("task", x, r"the batch is a Tensor"),
        ("task", {"x": x, "task": ["fr", "dee", "fr"]}, r"gives 'dee' for sample 1 of the batch.* It has `de`"),
        ("task", {"x": x, "task": torch.tensor([0, 3, 0])}, r"gives 3 for sample 1 .*`it`, with the indices 0 to 2"),
        ("task", {"x": x, "task": -1}, r"gives -1 for the batch, which is no adapter of this run"),
        ("task", {"x": x, "task": [True, False, True]}, r"gives True for sample 0"),
        ("task", {"x": x, "task": torch.zeros(3)}, r"gives 0\.0 for sample 0"),
        ("task", {"x": x, "task": torch.zeros(3, 1, dtype=torch.long)}, r"gives \[0\] for sample 0"),
        ("task", {"x": x, "task": {"fr": 1}}, r"must give names or indices of adapters, but got \{'fr': 1\}"),
        ("task", {"x": x, "task": ["fr", "de"]}, r"one for each sample, but gives 2 in a batch of 3 samples"),
        ("task", {"x": x, "task": []}, r"gives 0 in a batch of 3 samples"),
    ],
)
def test_any_other_entry_is_one_error_that_names_the_argument(key, batch, message):
    with pytest.raises(ValueError, match=message):
        Route(key, NAMES).names_in(batch)
