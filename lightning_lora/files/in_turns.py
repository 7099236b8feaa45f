"""Reading ahead and writing behind: files are read and written in threads while something else is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeVar

Item = TypeVar("Item")
LARGE = 1 << 20  # bytes of a piece from which on that call costs little


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while one is used, a thread gets the next."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]


@contextmanager
def write_behind(file: BinaryIO) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Yield a function that writes to ``file`` in a thread; at the end of the block everything is written.

    Each call waits until the piece of the call before is written; from then on that piece may change.

    Raises:
        OSError: if a piece could not be written, at the next one or at the end.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: Future[None] | None = None

        def write(piece: bytes | memoryview) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = thread.submit(_write, file, piece)

        yield write
        if pending is not None:
            pending.result()


def _write(file: BinaryIO, piece: bytes | memoryview) -> None:
    """Write ``piece``, and let the system write to the disk and forget what it holds of the file.

    Otherwise it holds as much of a large file as there is free memory, and fresh memory takes longer than the disk.
    """
    file.write(piece)
    if len(piece) >= LARGE and hasattr(os, "posix_fadvise"):  # macOS and Windows have no such call
        with suppress(OSError):  # it is advice only
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
