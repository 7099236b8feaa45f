"""A file or directory that appears when it is whole: written beside its place, and renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(
    out: Path,
    *,
    directory: bool,
    overwrite: bool,
    sources: Iterable[Path],
    size: int = 0,
    names: Container[str] = (),
) -> Iterator[Path]:
    """A path to write to, which becomes ``out`` at the end of the block; after an exception nothing is left of it.

    Args:
        out: where the result is to be.
        directory: whether it is a directory, which is made, or a file.
        overwrite: whether to replace what is at ``out``.
        sources: what is read meanwhile; ``out`` may not be, hold or lie in one of them.
        size: bytes that will be written, at least.
        names: paths in a directory ``out`` that may be replaced; it is refused if it holds others.

    Raises:
        FileExistsError: if there is something at ``out`` that may not be replaced.
        ValueError: if ``out`` and a source are in each other's way, or the disk has no room.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link is replaced, not what it points to
    for source in sources:
        _check_apart(out, source)
    _check_free(out, directory, overwrite)
    _check_others(out, names)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"`{out.parent}`, where {out.name!r} is to be, is no directory: make it first.")
    if size > shutil.disk_usage(out.parent).free:
        raise OSError(f"`{out.parent}` has no room for the {size:,} bytes that will be written.")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    _remove(part)
    try:
        if directory:
            part.mkdir()
        yield part
        _put(part, out)
    finally:
        _remove(part)


def _check_apart(out: Path, source: Path) -> None:
    one, other = out.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"`{out}` and `{source}`, which is read, must be apart: choose another place to write to.")


def _check_free(out: Path, directory: bool, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    empty = out.is_dir() and not any(out.iterdir())
    if directory and empty and not out.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"`{out}` exists: choose another name, or give --overwrite to replace it.")
    replaceable = any(out.glob("*.safetensors")) if out.is_dir() else out.suffix == ".safetensors"
    if out.is_symlink() or out.is_dir() != directory or not replaceable:
        kind = "directory with safetensors files" if directory else "safetensors file"
        raise FileExistsError(f"`{out}` is no {kind}, so --overwrite does not replace it: choose another name.")


def _check_others(out: Path, names: Container[str]) -> None:
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        if not path.is_dir() and str(path.relative_to(out)) not in names:
            raise FileExistsError(f"`{out}` holds `{path.relative_to(out)}` too: move it away, or choose another name.")


def _put(part: Path, out: Path) -> None:
    if not out.is_dir():
        part.replace(out)
        return
    old = out.with_name(f"{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        part.rename(out)
    except BaseException:
        old.rename(out)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
