"""The random state as data in a file."""

from __future__ import annotations

import random

import numpy as np
import torch

from lightning_lora.distributed.random_state import random_state, set_random_state, states_of_all_ranks

CPU = torch.device("cpu")


def draw() -> list:
    return [random.random(), random.gauss(0, 1), *np.random.randn(3).tolist(), *torch.rand(3).tolist()]


def test_the_stream_continues_after_a_file(tmp_path):
    random.gauss(0, 1)
    np.random.randn(1)  # the second of a pair is kept, and must travel
    torch.save(random_state(CPU), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert draw() == expected


def test_one_process_is_one_rank():
    state = random_state(CPU)
    assert states_of_all_ranks(state) == [state]
