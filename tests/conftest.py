"""What holds for every test: workers take one thread each, the environment is given back, no arguments are there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # torch would give every worker all cores


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what a test does to the environment variables.

    Lightning leaves LOCAL_RANK there after a fit with DDP, and a later Trainer with two devices waits for a second rank
    that it then does not start. pytest's own arguments go for the time of the test: LightningCLI warns of them.
    """
    before, arguments = dict(os.environ), sys.argv
    sys.argv = arguments[:1]
    yield
    sys.argv = arguments
    for name in (os.environ.keys() | before.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors alone: tiny random models make it warn of much."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
