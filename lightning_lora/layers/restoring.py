"""The context manager for changes that last as long as a ``with`` block, safe against Ctrl-C at any line.

A generator with ``contextlib.contextmanager`` is not safe: an interrupt between its ``yield`` and the body of the
``with`` statement reaches no ``finally``.
"""

from __future__ import annotations

from collections.abc import Callable

Undo = list[Callable[[], object]]


class Restoring:
    """Context manager that changes something on entry and restores it on exit.

    Args:
        change: called on entry with an empty list. Before each change it appends a function that undoes it, which may
            be called again and before the change was made.
    """

    def __init__(self, change: Callable[[Undo], None]) -> None:
        self.change = change
        self.undo: Undo = []

    def __enter__(self) -> None:
        try:
            self.change(self.undo)
        except BaseException:
            self.restore()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.restore()
        except BaseException:
            self.restore()
            raise

    def __del__(self) -> None:
        # An interrupt at the first line of `__exit__` comes before its `try`.
        self.restore()

    def restore(self) -> None:
        """Undo the changes, the last one first."""
        undo = vars(self).get("undo")  # not there if an interrupt came in `__init__`
        while undo:
            undo[-1]()
            undo.pop()
