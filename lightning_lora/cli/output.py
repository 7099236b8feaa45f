"""Where a command may write: nothing is replaced without --overwrite, and nothing that is no model or adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.files.atomic import atomic_write


@contextmanager
def new_output(
    out: Path,
    *,
    directory: bool,
    overwrite: bool,
    sources: Iterable[Path],
    size: int = 0,
    names: Container[str] = (),
) -> Iterator[Path]:
    """Yield a path to write to, which becomes ``out`` at the end of the block; after an exception it is removed.

    Args:
        out: where the result will be.
        directory: whether it is a directory, which is made, or a file.
        overwrite: whether to replace what is at ``out``.
        sources: files and directories that the command reads; ``out`` may not be, hold or lie in one of them.
        size: bytes that will be written, at least.
        names: paths in a directory ``out`` that may be replaced; a directory that holds others is refused.

    Raises:
        FileExistsError: if there is something at ``out`` that may not be replaced.
        ValueError: if ``out`` and a source overlap.
        OSError: if the disk has not enough space.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link is replaced, not what it points to
    for source in sources:
        _check_apart(out, source)
    _check_free(out, directory, overwrite)
    _check_names(out, names)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"`{out.parent}`, the folder of {out.name!r}, is no directory: make it first.")
    if size > shutil.disk_usage(out.parent).free:
        raise OSError(f"`{out.parent}` has no space for the {size:,} bytes that will be written.")
    with atomic_write(out, directory=directory) as part:
        yield part


def check_free(path: Path, overwrite: bool) -> None:
    """Raise if there is something at ``path`` and ``overwrite`` is not given.

    Raises:
        FileExistsError: if there is.
    """
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise FileExistsError(f"`{path}` exists: choose another name, or give --overwrite to replace it.")


def _check_apart(out: Path, source: Path) -> None:
    written, read = out.resolve(), source.resolve()
    if written == read or written in read.parents or read in written.parents:
        raise ValueError(f"`{out}` and the input `{source}` must be apart: choose another place to write to.")


def _check_free(out: Path, directory: bool, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    empty = out.is_dir() and not any(out.iterdir())
    if directory and empty and not out.is_symlink():
        return
    check_free(out, overwrite)
    replaceable = any(out.glob("*.safetensors")) if out.is_dir() else out.suffix == ".safetensors"
    if out.is_symlink() or out.is_dir() != directory or not replaceable:
        kind = "directory with safetensors files" if directory else "safetensors file"
        raise FileExistsError(f"`{out}` is no {kind}, so --overwrite does not replace it: choose another name.")


def _check_names(out: Path, names: Container[str]) -> None:
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        if not path.is_dir() and str(path.relative_to(out)) not in names:
            raise FileExistsError(f"`{out}` holds `{path.relative_to(out)}` too: move it away, or choose another name.")
