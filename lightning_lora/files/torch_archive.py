"""The zip archives that ``torch.save`` writes: structure and checksums are checked, which ``torch.load`` does not do.

The format is that of https://docs.pytorch.org/docs/stable/notes/serialization.html: a zip of records that are not
compressed, ``<folder>/data.pkl`` with the structure and one ``<folder>/data/<key>`` for each storage. Nothing is
unpickled here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_lora.files.json_files import shown

BEGIN = b"PK\x03\x04"  # a zip archive begins with its first record
# The tables of the zip format (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.14, 4.3.15, 4.3.16).
LOCAL = struct.Struct("<4s5H3L2H")
ENTRY = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
IN_ZIP64 = (1 << 32) - 1  # the number is in the entry's field of 64 bits instead
LONGEST_DIRECTORY = 50_000_000  # bytes; a storage takes about 70
CHUNK = 1 << 20
STRUCTURE, STORAGE = "data.pkl", "data/"


@dataclass(frozen=True)
class Record:
    """One file in the archive: where its bytes are, and their checksum."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """The records of a file that ``torch.save`` wrote, by name without the folder."""

    path: Path
    records: dict[str, Record]

    def structure(self) -> bytes:
        """The pickle, whose checksum is checked."""
        record = self.records[STRUCTURE]
        with self.path.open("rb") as file:
            file.seek(record.start)
            text = file.read(record.size)
        if record.crc and zlib.crc32(text) != record.crc:
            raise _other_bytes(STRUCTURE)
        return text

    def storages(self) -> dict[str, int]:
        """The size of each storage in bytes, by its key."""
        return {
            name.removeprefix(STORAGE): record.size for name, record in self.records.items() if name.startswith(STORAGE)
        }

    def check_sums(self) -> None:
        """Read the whole file and compare the checksums. Other threads run meanwhile.

        Raises:
            ValueError: naming the first record with other bytes than were written.
        """
        if not any(record.crc for record in self.records.values()):
            return  # written under `torch.serialization.set_crc32_options(False)`
        buffer = memoryview(bytearray(CHUNK))
        with self.path.open("rb", buffering=0) as file:
            for name, record in self.records.items():
                if _sum(file, record, buffer) != record.crc:
                    raise _other_bytes(name)


def _sum(file: BinaryIO, record: Record, buffer: memoryview) -> int:
    file.seek(record.start)
    left, crc = record.size, 0
    while left:
        count = file.readinto(buffer[: min(left, CHUNK)])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ended while it was read")
        crc, left = zlib.crc32(buffer[:count], crc), left - count
    return crc


def _other_bytes(name: str) -> ValueError:
    return ValueError(f"{shown(name)} has other bytes than were written: a disk or a copy damaged it")


def is_archive(path: Path) -> bool:
    """Whether the file at ``path`` begins as a zip archive."""
    with path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN


def open_archive(path: Path) -> Archive:
    """Read and check the table of contents of a file that ``torch.save`` wrote.

    Every record lies in the file, none overlaps another, and none is compressed, so reading all of them takes no more
    memory than the file has bytes.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if the file is of another kind, or damaged.
    """
    if not path.is_file():
        path.stat()  # raises where there is nothing
        raise ValueError("it is a directory or a device")
    if not is_archive(path):
        raise ValueError("it is no zip archive, as torch.save writes since torch 1.6")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            count, start = _find_directory(file, size)
            file.seek(start)
            entries = list(_entries(file.read(LONGEST_DIRECTORY), count))
            records = {name: _record(file, name, *where) for name, *where in entries}
        except (struct.error, UnicodeDecodeError, OverflowError, OSError) as error:
            raise ValueError("its table of contents is damaged") from error
    if len(records) != len(entries):
        raise ValueError("two of its records have one name")
    _check_places(list(records.values()), start)
    return Archive(path, _without_folder(records))


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """How many entries the table of contents has, and where it begins."""
    file.seek(max(0, size - END.size))
    mark, *_, count, length, start, comment = END.unpack(file.read())
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("its end is missing: it is cut")
    file.seek(max(0, size - END.size - LOCATOR.size))
    mark, _, position, _ = LOCATOR.unpack(file.read(LOCATOR.size))
    if mark == b"PK\x06\x07":
        file.seek(position)
        mark, *_, count, length, start = END64.unpack(file.read(END64.size))
        if mark != b"PK\x06\x06":
            raise ValueError("its end is damaged")
    if not (0 < start < start + length < size and length <= LONGEST_DIRECTORY and count * ENTRY.size <= length):
        raise ValueError("its table of contents does not fit into it")
    return count, start


def _entries(table: bytes, count: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, position, size and checksum of each record."""
    at = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, offset = ENTRY.unpack_from(table, at)
        of_name, of_extra, of_comment = lengths
        name = table[at + ENTRY.size : at + ENTRY.size + of_name]
        extra = table[at + ENTRY.size + of_name :][:of_extra]
        if IN_ZIP64 in (size, packed, offset):
            size, packed, offset = _from_zip64(extra, size, packed, offset)
        if mark != b"PK\x01\x02" or method or flags & 1 or size != packed:
            raise ValueError("its table of contents is damaged, or its records are compressed")
        yield name.decode(), offset, size, crc
        at += ENTRY.size + of_name + of_extra + of_comment


def _from_zip64(extra: bytes, *numbers: int) -> list[int]:
    """``numbers`` with those that 32 bits have no room for, which follow each other in the field of kind 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            large = iter(struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8]))
            return [next(large, (0,))[0] if number == IN_ZIP64 else number for number in numbers]
        at += 4 + length
    raise ValueError("its table of contents is damaged")


def _record(file: BinaryIO, name: str, offset: int, size: int, crc: int) -> Record:
    file.seek(offset)
    mark, *_, of_name, of_extra = LOCAL.unpack(file.read(LOCAL.size))
    if mark != BEGIN or file.read(of_name) != name.encode():
        raise ValueError(f"{shown(name)} is not where its table of contents says")
    return Record(offset + LOCAL.size + of_name + of_extra, size, crc)


def _check_places(records: list[Record], stop: int) -> None:
    end = 0
    for record in sorted(records, key=lambda record: (record.start, record.size)):
        if record.start < end:
            raise ValueError("two of its records have the same bytes")
        end = record.start + record.size
    if end > stop:
        raise ValueError("a record does not fit into it")


def _without_folder(records: dict[str, Record]) -> dict[str, Record]:
    """All records lie in one folder, whose name torch takes from the file's."""
    folder = next(iter(records), "").partition("/")[0]
    inside = {name.removeprefix(f"{folder}/"): record for name, record in records.items()}
    if STRUCTURE not in inside or not all(name.startswith(f"{folder}/") for name in records):
        raise ValueError("it was not written by torch.save")
    return inside
