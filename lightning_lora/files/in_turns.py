"""Reading ahead and writing behind: files are read and written in threads while something else is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; while one is used, a thread gets the next."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class WriteBehind:
    """Writes to ``file`` in a thread. At most one piece is being written; :meth:`write` waits for the one before it."""

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self._pending: Future[int] | None = None

    def write(self, piece: bytes | memoryview) -> None:
        """Start to write ``piece``, which must not change before the next call returns."""
        self.wait()
        self._pending = self._thread.submit(self._file.write, piece)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: if it could not be written.
        """
        if self._pending is not None:
            self._pending.result()


@contextmanager
def write_behind(file: BinaryIO) -> Iterator[WriteBehind]:
    """A writer to ``file``; at the end of the block everything is written."""
    with ThreadPoolExecutor(1) as thread:
        writer = WriteBehind(file, thread)
        yield writer
        writer.wait()
