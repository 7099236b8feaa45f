"""What holds for every test: workers take one thread each, the environment is given back, no arguments are there."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Generator, Iterator

import pytest

logging.basicConfig()  # Lightning hands its messages to the root logger only if that has a handler at the import

if "PYTEST_XDIST_WORKER" in os.environ:  # the process that starts the workers does without torch
    import torch

    torch.set_num_threads(1)  # torch would give every worker all cores


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from modules and test items.

    They stay until the end, and are so many that one pass over them takes half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
    for name in {name for name, _ in before.items() ^ dict(os.environ).items()} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


class Messages(logging.Handler):
    """Keeps the messages it gets in ``texts``."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The messages that a test logs, from INFO on.

    It takes the place of pytest's `caplog`, whose plugin is off (see ``addopts``).
    """
    root, handler = logging.getLogger(), Messages()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.texts
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors alone: tiny random models make it warn of much."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
