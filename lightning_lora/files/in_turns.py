"""Reading ahead and writing behind: files are read and written in threads while something else is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


@contextmanager
def write_behind(file: BinaryIO) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Yield a function that writes to ``file`` in a thread; at the end of the block everything is written.

    Each call waits until the piece of the call before is written; from then on that piece may change.

    Raises:
        OSError: if a piece could not be written, at the next one or at the end.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: Future[int] | None = None

        def write(piece: bytes | memoryview) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = thread.submit(file.write, piece)

        yield write
        if pending is not None:
            pending.result()
