"""Which tests of whole runs the fast selection takes: a run costs a tenth of a second, and there are a thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAST = {
    "test_callback.py",
    "test_checks.py",
    "test_compatibility.py",
    "test_lightning_cli.py",
    "test_liveness.py",
}


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder as slow, but for the files of ``FAST``."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.path.name not in FAST:
            item.add_marker(pytest.mark.slow)
