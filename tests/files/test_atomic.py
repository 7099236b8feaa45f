"""Atomic writes: all of the new content or all of the old one, whoever else writes, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_lora.files import atomic
from lightning_lora.files.atomic import PART, atomic_write, write_together
from lightning_lora.trainer.checkpointing.contents import write_checkpoint

DEAD = PART.format("0" * 16)
# The file alone, as the package imports torch.
IMPORT = f"""
import runpy, sys, time
from pathlib import Path
atomic_write = runpy.run_path({atomic.__file__!r})["atomic_write"]
"""
# Arguments: path, letter, how often.
WRITE = """
for _ in range(int(sys.argv[3])):
    with atomic_write(Path(sys.argv[1])) as part:
        part.write_text(sys.argv[2] * 10_000)
"""
# Starts to write, prints the name of the part, then waits.
WAIT = """
with atomic_write(Path(sys.argv[1]), directory=len(sys.argv) > 2) as part:
    (part / "a" if len(sys.argv) > 2 else part).write_text("half")
    print(part.name, flush=True)
    time.sleep(600)
"""


def started(script, *arguments):
    command = [sys.executable, "-c", IMPORT + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process):
    """The exit status of a process, whose pipe is closed."""
    with process:
        return process.wait()


def write(path, text="new"):
    with atomic_write(path) as part:
        part.write_text(text)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_directory(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "file", text)
        with atomic_write(tmp_path / "folder", directory=True) as part:
            (part / text).write_text(text)
    assert (tmp_path / "file").read_text() == "new"
    assert names_in(tmp_path / "folder") == ["new"]
    assert names_in(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("directory", [False, True])
def test_an_error_leaves_the_old_content(tmp_path, error, directory):
    target = tmp_path / "target"
    if directory:
        target.mkdir()
    inside = target / "a" if directory else target
    inside.write_text("old")
    with pytest.raises(error), atomic_write(target, directory=directory) as part:
        (part / "a" if directory else part).write_text("half")
        raise error
    assert inside.read_text() == "old" and names_in(tmp_path) == ["target"]


def test_a_directory_comes_back_when_its_place_cannot_be_taken(tmp_path, monkeypatch):
    target, rename = tmp_path / "target", Path.rename
    target.mkdir()
    (target / "a").write_text("old")
    attempts = []

    def fails(self, new):
        if self.suffix == ".part" and Path(new) == target:
            attempts.append(new)
            if len(attempts) == 2:
                raise PermissionError("no")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(PermissionError, match="no"), atomic_write(target, directory=True):
        pass
    assert (target / "a").read_text() == "old" and names_in(tmp_path) == ["target"]


@pytest.mark.parametrize("length", [244, 255])
def test_names_of_any_length(tmp_path, length):
    write(tmp_path / ("x" * length))
    assert names_in(tmp_path) == ["x" * length]


def test_equal_checkpoints_have_equal_bytes(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        write_checkpoint({"a": torch.ones(3)}, tmp_path / name)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


@pytest.mark.parametrize("directory", [False, True])
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch, directory):
    tokens = iter(["planted", "fresh"])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: next(tokens))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / PART.format("planted")).symlink_to(victim)
    with atomic_write(tmp_path / "target", directory=directory) as part:
        (part / "a" if directory else part).write_text("new")
    assert victim.read_text() == "mine"
    assert names_in(tmp_path) == sorted([PART.format("planted"), "target", "victim"])


def test_the_mode_is_that_of_any_new_file(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_threads_do_not_collide(tmp_path):
    target = tmp_path / "target"
    write(target, "0" * 10_000)

    def both(letter):
        seen = set()
        for _ in range(20):
            write(target, letter * 10_000)
            text = target.read_text()
            assert len(text) == 10_000
            seen.add(frozenset(text))
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert all(len(letters) == 1 for seen in pool.map(both, "abcd") for letters in seen)
    assert names_in(tmp_path) == ["target"]


@pytest.mark.slow
@pytest.mark.skipif(atomic.fcntl is None, reason="no locks")
def test_processes_do_not_collide(tmp_path):
    target = tmp_path / "target"
    writers = [started(WRITE, target, letter, 60) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        if target.exists():
            text = target.read_text()
            assert text in ("a" * 10_000, "b" * 10_000)
    assert [finished(writer) for writer in writers] == [0, 0] and names_in(tmp_path) == ["target"]


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks")
def test_directories_of_two_threads_do_not_collide(tmp_path):
    def replace(letter):
        for _ in range(10):
            with atomic_write(tmp_path / "target", directory=True) as part:
                for name in "xy":
                    (part / name).write_text(letter)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(replace, "abc"))
    assert names_in(tmp_path) == ["target"]
    assert (tmp_path / "target" / "x").read_text() == (tmp_path / "target" / "y").read_text()


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks")
@pytest.mark.parametrize("kind", [[], ["directory"]])
def test_parts_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path, kind):
    writer = started(WAIT, tmp_path / "other", *kind)
    part = writer.stdout.readline().strip()
    (tmp_path / DEAD).write_text("half")
    write(tmp_path / "target")
    assert names_in(tmp_path) == sorted([part, "target"])
    writer.send_signal(signal.SIGKILL)
    finished(writer)
    write(tmp_path / "target")
    assert names_in(tmp_path) == ["target"]


def test_what_only_looks_like_a_part_stays(tmp_path):
    others = ["x.part", PART.format("mine"), PART.format("0" * 17), "lightning_lora-0123456789abcdef.old"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / DEAD).symlink_to(tmp_path / "victim")
    write(tmp_path / "target")
    assert names_in(tmp_path) == sorted([*others, DEAD, "target", "victim"])


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "No space left")])
def test_a_full_disk_is_called_so(tmp_path, monkeypatch, error):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left") as raised, atomic_write(tmp_path / "target"):
        raise error
    assert raised.value.errno == errno.ENOSPC and names_in(tmp_path) == []


def test_an_error_on_a_disk_with_space_is_what_it_was(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected pos"), atomic_write(tmp_path / "target"):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename, replace = [], os.fsync, Path.rename, Path.replace

    def synced(file):
        events.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, new: (events.append("renamed"), replace(self, new))[1])
    monkeypatch.setattr(Path, "rename", lambda self, new: (events.append("renamed"), rename(self, new))[1])
    write(tmp_path / "target")
    assert events[1:] == ["renamed", tmp_path.name] and PART.format("*").split("*")[0] in events[0]
    events.clear()
    with atomic_write(tmp_path / "folder", directory=True) as part:
        (part / "a").write_text("")
    assert events == ["a", part.name, "renamed", tmp_path.name]


def test_two_files_or_none(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_together({tmp_path / "new": {"one": lambda path: path.write_text("1"), "two": fails}})
    assert names_in(tmp_path) == []
    for text in "ab":
        files = dict.fromkeys(("one", "two"), lambda path, text=text: path.write_text(text))
        write_together({tmp_path / "new": files})
    assert {path.read_text() for path in (tmp_path / "new").iterdir()} == {"b"} and len(names_in(tmp_path / "new")) == 2


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("broken", range(4))
def test_all_directories_or_none(tmp_path, monkeypatch, broken, has_links):
    """An interrupt at any of the four renames leaves the old files, and no new directory."""

    def write(text, *names):
        files = dict.fromkeys(("small", "large"), lambda path: path.write_text(text))
        write_together({tmp_path / name: files for name in names})

    def read():
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    def hardlink_to(self, target):
        raise OSError("no links")

    write("old", "fr")
    before, calls, replace = read(), [], Path.replace

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == broken + 1:
            raise KeyboardInterrupt
        return replace(self, target)

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        write("new", "fr", "de")
    assert read() == before and names_in(tmp_path) == ["fr"]
    write("new", "fr", "de")
    assert read() == {f"{name}/{file}": "new" for name in ("fr", "de") for file in ("small", "large")}


def test_two_files_in_a_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_together({tmp_path / "link": {"one": Path.touch, "two": Path.touch}})
    assert names_in(tmp_path / "real") == ["one", "two"]


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks")
def test_a_folder_that_the_user_has_locked_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PATIENCE", 0.05)
    file = os.open(tmp_path, os.O_RDONLY)
    atomic.fcntl.flock(file, atomic.fcntl.LOCK_EX)
    write_together({tmp_path: {"one": Path.touch, "two": Path.touch}})
    os.close(file)
    assert names_in(tmp_path) == ["one", "two"]
