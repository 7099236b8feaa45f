"""The zip archives of torch.save: where records lie, and checksums."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_lora.files.torch_archive import open_archive

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def path(tmp_path):
    torch.save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int64)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def rewritten(path: Path, change, compression=zipfile.ZIP_STORED) -> None:
    """Write the archive again by Python's zipfile, with `change(name, data)` giving names and data of each record."""
    with zipfile.ZipFile(path) as archive:
        records = [pair for name in archive.namelist() for pair in change(name, archive.read(name))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


def test_records_are_those_that_zipfile_finds(path):
    archive = open_archive(path)
    with zipfile.ZipFile(path) as expected:
        for info in expected.infolist():
            record = archive.records[info.filename.partition("/")[2]]
            assert (record.size, record.crc) == (info.file_size, info.CRC)
            assert path.read_bytes()[record.start : record.start + record.size] == expected.read(info)
    assert archive.storages() == {"0": 24, "1": 24}
    archive.check_sums()


@pytest.mark.parametrize("name", ["format_1.ckpt", "format_2.ckpt"])
def test_committed_files_are_sound(name):
    open_archive(FIXTURES / name).check_sums()


def test_every_flipped_bit_of_a_record_is_found(path):
    whole, record = path.read_bytes(), open_archive(path).records["data/0"]
    for bit in range(record.size * 8):
        damaged = bytearray(whole)
        damaged[record.start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"`data/0` has other bytes than were written"):
            open_archive(path).check_sums()


def test_every_cut_is_found(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"it is no zip|its end is missing|does not fit|table of contents"):
            open_archive(path)


def test_a_file_without_checksums_is_read(path, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0)}, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    open_archive(tmp_path / "b.pt").check_sums()


def test_what_is_no_archive_of_torch(path, tmp_path):
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"no zip archive, as torch\.save writes since"):
        open_archive(tmp_path / "old.pt")
    with pytest.raises(ValueError, match="a directory or a device"):
        open_archive(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_archive(tmp_path / "none")
    rewritten(path, lambda name, data: [(f"other{name}" if "version" in name else name, data)])
    with pytest.raises(ValueError, match=r"was not written by torch.save"):
        open_archive(path)


def test_records_that_would_take_more_memory_than_the_file_has(path):
    whole = path.read_bytes()
    rewritten(path, lambda name, data: [(name, data)], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its records are compressed"):
        open_archive(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(path, lambda name, data: [(name, data)] * (2 if name.endswith("data/0") else 1))
    with pytest.raises(ValueError, match="two of its records have one name"):
        open_archive(path)
    # Both entries point to the record of the first: the table of contents has names of equal length.
    table = whole.index(b"PK\x01\x02")
    first, second = (whole.index(name, table) for name in (b"a/data/0", b"a/data/1"))
    overlapping = bytearray(whole)
    overlapping[second - 4 : second] = whole[first - 4 : first]
    path.write_bytes(overlapping)
    with pytest.raises(ValueError, match="is not where its table of contents says"):
        open_archive(path)
