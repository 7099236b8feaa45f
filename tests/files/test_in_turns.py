"""Reading ahead and writing behind: the same items, the same bytes, and every error."""

import errno
import io
import os
import threading

import pytest

from lightning_lora.files.in_turns import LARGE, read_ahead, write_behind


def test_items_come_in_their_order():
    assert list(read_ahead(range(20))) == list(range(20))
    assert list(read_ahead([])) == []
    assert list(read_ahead([None, None])) == [None, None]


def test_the_next_item_is_got_while_one_is_used():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    for item in read_ahead(items()):
        assert item == 2 or second.wait(60)


def test_an_error_comes_in_the_place_of_its_item():
    def items():
        yield 1
        raise ValueError("damaged")

    seen = []
    with pytest.raises(ValueError, match="damaged"):
        seen.extend(read_ahead(items()))
    assert seen == [1]


def test_pieces_are_written_in_their_order(tmp_path):
    with (tmp_path / "file").open("wb") as file, write_behind(file) as write:
        for number in range(50):
            write(bytes([number]))
    assert (tmp_path / "file").read_bytes() == bytes(range(50))


def test_all_but_the_last_piece_may_change_while_the_next_is_made(tmp_path):
    pieces = [bytearray(3), bytearray(3)]
    with (tmp_path / "file").open("wb") as file, write_behind(file) as write:
        for number in range(20):
            pieces[number % 2][:] = bytes([number]) * 3
            write(memoryview(pieces[number % 2]))
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 3 for number in range(20))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_the_system_is_not_asked_to_hold_what_was_written(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *arguments: asked.append(arguments))
    with (tmp_path / "file").open("wb") as file, write_behind(file) as write:
        for size in (LARGE, 10, LARGE):
            write(bytes(size))
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_a_system_without_that_call_writes_all_the_same(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with (tmp_path / "file").open("wb") as file, write_behind(file) as write:
        write(b"a" * LARGE)
    assert (tmp_path / "file").read_bytes() == b"a" * LARGE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_a_file_system_that_refuses_it_is_written_all_the_same(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with (tmp_path / "file").open("wb") as file, write_behind(file) as write:
        write(b"a" * LARGE)
    assert (tmp_path / "file").read_bytes() == b"a" * LARGE


class Full(io.BytesIO):
    def write(self, piece):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_though_nothing_is_written_after_it():
    with pytest.raises(OSError, match="No space left"), write_behind(Full()) as write:
        write(b"1")


def test_an_error_of_the_caller_is_not_hidden_by_one_of_the_disk():
    with pytest.raises(ValueError, match="own"), write_behind(Full()) as write:
        write(b"1")
        raise ValueError("own")
