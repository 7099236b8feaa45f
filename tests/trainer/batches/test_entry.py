"""The entry of a batch that an argument names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_lora.trainer.batches.entry import entry_of

TASKS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ({"x": 0, "task": TASKS}, "task"),
        ((0, TASKS), 1),
        ([0, TASKS], "1"),  # as the command line gives it
        (SimpleNamespace(x=0, task=TASKS), "task"),
    ],
)
def test_where_it_may_be(batch, key):
    assert entry_of(batch, key, "segments") is TASKS


@pytest.mark.parametrize(
    ("batch", "key", "described"),
    [
        ({"x": 0}, "task", "a dict with the keys 'x'"),
        ([0, 1], 2, "a list of 2"),
        ([0, 1], "index", "a list of 2"),
        (TASKS, "shape", "a Tensor"),
    ],
)
def test_an_entry_that_is_not_there(batch, key, described):
    with pytest.raises(ValueError, match=rf"`segments={key!r}` must be an entry of every batch, .* is {described}\."):
        entry_of(batch, key, "segments")
