"""Paths that cannot be written are known before there is anything to write."""

from __future__ import annotations

import pytest

from lightning_lora.files.writable import why_unwritable


@pytest.mark.parametrize("path", ["new", "a/b/c", "."])
def test_nothing_is_left_of_a_look(path, tmp_path):
    assert why_unwritable(tmp_path / path) is None
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "file/adapter", "dangling"):
        assert why_unwritable(tmp_path / path) == f"{tmp_path / path.partition('/')[0]} is not a directory"
    assert why_unwritable("/proc/adapter") is not None  # no permission is missing there
    assert why_unwritable(tmp_path / ("x" * 300)) == f"File name too long ({tmp_path / ('x' * 300)})"
