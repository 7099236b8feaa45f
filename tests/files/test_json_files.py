"""JSON that is no object, no JSON, too deep or too large."""

from __future__ import annotations

import pytest

from lightning_lora.files.json_files import read_object


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[1]", r"must hold a JSON object, but holds `\[1\]`"),
        (b'{"r": 1, "r": 2}', "`r` is there twice"),
        (b"{", "is damaged or truncated"),
        (b"\xff\xfe{", "is damaged or truncated"),
        (b"[" * 200_000, "is damaged or truncated"),
    ],
)
def test_refused(tmp_path, text, match):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=match):
        read_object(tmp_path / "x.json")


def test_too_large(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="too many for a configuration"):
        read_object(tmp_path / "x.json")


def test_read(tmp_path):
    (tmp_path / "x.json").write_text('{"r": 8}')
    assert read_object(tmp_path / "x.json") == {"r": 8}
