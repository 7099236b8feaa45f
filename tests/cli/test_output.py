"""What a command may replace, and that its output appears when it is complete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_lora.cli.output import new_output


def write(out, overwrite=False, directory=True, sources=(), fail=None, **kwargs):
    with new_output(out, directory=directory, overwrite=overwrite, sources=sources, **kwargs) as part:
        assert part.parent == out.absolute().parent, "the same disk"
        (part / "new.safetensors" if directory else part).write_text("new")
        if fail is not None:
            raise fail


def filled(folder: Path, name="old.safetensors") -> Path:
    folder.mkdir()
    (folder / name).write_text("old")
    return folder


def test_appears(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / "out.safetensors", directory=False)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out", "out.safetensors"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("directory", [True, False])
def test_nothing_is_left_after_an_error(tmp_path, error, directory):
    with pytest.raises(type(error)):
        write(tmp_path / "out.safetensors", directory=directory, fail=error)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    out = filled(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: choose another name, or give --overwrite"):
        write(out)
    names = {"old.safetensors"}
    with pytest.raises(ValueError, match="x"):
        write(out, overwrite=True, fail=ValueError("x"), names=names)
    assert [path.name for path in out.iterdir()] == ["old.safetensors"]
    write(out, overwrite=True, names=names)
    assert [path.name for path in out.iterdir()] == ["new.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_else_is_there_is_never_removed(tmp_path):
    out = filled(tmp_path / "out")
    (out / "notes").mkdir()
    (out / "notes/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds `notes.thesis.txt` too: move it away"):
        write(out, overwrite=True, names={"old.safetensors"})
    assert (out / "notes/thesis.txt").read_text() == "mine"


def test_overwrite_replaces_models_only(tmp_path):
    for directory, out in ((True, filled(tmp_path / "home", "letter.txt")), (False, tmp_path / "home" / "letter.txt")):
        with pytest.raises(FileExistsError, match="--overwrite does not replace it"):
            write(out, overwrite=True, directory=directory)
    assert (tmp_path / "home/letter.txt").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_links_are_not_followed(tmp_path):
    out = filled(tmp_path / "real")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(FileExistsError):
        write(tmp_path / "link", overwrite=True)
    assert (out / "old.safetensors").exists()


def test_sources_are_safe(tmp_path):
    base = filled(tmp_path / "base")
    for out in (base, tmp_path, base / ".." / "base", base / "out"):
        for overwrite in (True, False):
            with pytest.raises(ValueError, match="must be apart"):
                write(out, overwrite=overwrite, sources=[base])
    with pytest.raises(ValueError, match="must be apart"):
        write(base / "old.safetensors", overwrite=True, directory=False, sources=[base / "old.safetensors"])
    assert (base / "old.safetensors").read_text() == "old"


def test_no_room_and_no_parent(tmp_path):
    with pytest.raises(OSError, match="no space for the"):
        write(tmp_path / "out", size=2**60)
    with pytest.raises(FileNotFoundError, match="is no directory: make it first"):
        write(tmp_path / "none" / "out")
