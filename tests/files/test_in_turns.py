"""Reading ahead and writing behind: the same items, the same bytes, and every error."""

import io
import threading

import pytest

from lightning_lora.files.in_turns import read_ahead, write_behind


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


def test_pieces_are_written_in_their_order():
    file = io.BytesIO()
    with write_behind(file) as write:
        for number in range(50):
            write(bytes([number]))
    assert file.getvalue() == bytes(range(50))


def test_all_but_the_last_piece_may_change_while_the_next_is_made():
    file, pieces = io.BytesIO(), [bytearray(3), bytearray(3)]
    with write_behind(file) as write:
        for number in range(20):
            pieces[number % 2][:] = bytes([number]) * 3
            write(memoryview(pieces[number % 2]))
    assert file.getvalue() == b"".join(bytes([number]) * 3 for number in range(20))


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
