"""One way to write a file or a directory: under a random name in the same folder, to the disk, then renamed.

A reader sees the old content or the new one, also after a kill or a power failure. The unfinished file or directory is
called a part. Its writer holds a lock (flock) on it. A part that nobody has locked was left by a process that died, and
the next write into the same folder removes it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; parts of dead processes stay there
    fcntl = None  # type: ignore[assignment]

# Parts do not have the target's name in theirs: a name may have 255 bytes, and the target's may need all of them.
PART = "lightning_lora-{}.part"
OLD = "lightning_lora-{}.old"
PART_NAME = re.compile(r"lightning_lora-[0-9a-f]{16}\.part")
PATIENCE = 5  # seconds; the renames that the lock is for take milliseconds
FULL = 1 << 20  # free bytes below which a failed write is taken for a full disk


@contextmanager
def atomic_write(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a path to write to; it becomes ``target`` at the end of the block, or is removed after an exception.

    Write into the given file itself: the lock is on it, so it must not be replaced by another file.

    Args:
        target: file or directory to write or to replace; its folder must exist.
        directory: whether ``target`` is a directory.

    Raises:
        OSError: if the target cannot be written; its ``errno`` is ``ENOSPC`` where the disk is full.
    """
    with _part(target.parent, directory) as part:
        yield part
        _flush(part)
        _rename(part, target)
        _flush_directory(target.parent)


def write_together(directories: Mapping[Path, Mapping[str, Callable[[Path], object]]]) -> None:
    """Write files of one or several directories that belong together: after an error the old ones are all there.

    After a kill while files are renamed some directories are new and some are old.

    Args:
        directories: for each directory, made if it does not exist, the functions that write its files, by the file's
            name; the largest file last.
    """
    with _new_directories(directories), ExitStack() as stack:
        parts: dict[Path, Path] = {}
        for directory, writers in directories.items():
            new = {directory / name: stack.enter_context(_part(directory)) for name in writers}
            for target, part in new.items():
                writers[target.name](part)
                _flush(part)
            parts |= new
        for directory in directories:
            lock = stack.enter_context(_opened(directory.resolve()))
            _lock_for_a_moment(lock)  # so that two writers do not mix their files
        _rename_together(parts)
        for directory in directories:
            _flush_directory(directory)


@contextmanager
def _new_directories(directories: Iterable[Path]) -> Iterator[None]:
    """Make the ``directories`` that do not exist; after an error those that are empty are removed again."""
    made = [directory for directory in directories if not directory.exists()]
    try:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for directory in made:
            with suppress(OSError):  # somebody else wrote into it
                directory.rmdir()
        raise


def _rename_together(parts: Mapping[Path, Path]) -> None:
    *first, _ = parts
    with ExitStack() as stack:
        before = {target: _second_name(target, stack) for target in first}
        try:
            for target, part in parts.items():
                part.replace(target)
        except BaseException:
            for target, old in before.items():
                target.unlink(missing_ok=True) if old is None else old.replace(target)
            raise


def _second_name(target: Path, stack: ExitStack) -> Path | None:
    """A second name for the file at ``target``, until ``stack`` closes; ``None`` if there is no file."""
    if not target.exists():
        return None
    second = target.with_name(PART.format(secrets.token_hex(8)))
    _lock_for_a_moment(stack.enter_context(_opened(target.resolve())))  # so that no other writer removes `second`
    stack.callback(second.unlink, missing_ok=True)
    try:
        second.hardlink_to(target.resolve())
    except OSError:  # a file system without hard links
        shutil.copy2(target, second)
    return second


def remove_dead_parts(folder: Path) -> None:
    """Remove the parts in ``folder`` that no live process has locked."""
    for part in sorted(folder.glob(PART.format("*"))):
        if not PART_NAME.fullmatch(part.name):
            continue
        with suppress(OSError), _opened(part) as file:  # somebody else may remove it first, or own it
            if _lock(file, wait=False):
                _remove(part)


@contextmanager
def _part(folder: Path, directory: bool = False) -> Iterator[Path]:
    """A new empty file or directory in ``folder``, locked; what is left of it at the end of the block is removed."""
    remove_dead_parts(folder)
    with ExitStack() as stack:
        part = _create(folder, directory, stack)
        try:
            yield part
        except Exception as error:
            # torch and safetensors report a full disk as an error of their own, or as a wrong position in the file.
            if not isinstance(error, OSError) and shutil.disk_usage(folder).free < FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
        finally:
            _remove(part)


def _create(folder: Path, directory: bool, stack: ExitStack) -> Path:
    while True:
        part = folder / PART.format(secrets.token_hex(8))
        try:
            part.mkdir() if directory else part.touch(exist_ok=False)  # neither follows a link of that name
            file = stack.enter_context(_opened(part))
        except (FileExistsError, FileNotFoundError):
            if not folder.is_dir():
                raise
            continue
        _lock(file, wait=True)
        if part.exists():  # another writer may have taken it for a dead part before it was locked
            return part


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor to lock ``path`` by; ``None`` where the system has no flock."""
    if fcntl is None:
        yield None
        return
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)


def _lock(file: int | None, *, wait: bool) -> bool:
    if file is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # somebody has it, or the file system has no locks: then nobody gets one
        return False
    return True


def _lock_for_a_moment(file: int | None) -> None:
    """Wait for the lock, but not for ever: the user may hold it, as ``flock directory python train.py`` does."""
    deadline = time.monotonic() + PATIENCE
    while file is not None and not _lock(file, wait=False) and time.monotonic() < deadline:
        time.sleep(0.01)


def _flush(path: Path) -> None:
    """Wait until ``path`` and all that is in it is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _flush(child)
        _flush_directory(path)
        return
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    with suppress(OSError):  # Windows opens no directories, and some file systems do not flush them
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _rename(part: Path, target: Path) -> None:
    """Put ``part`` in the place of ``target``; no system call replaces a directory that has files."""
    if not part.is_dir():
        part.replace(target)
        return
    with ExitStack() as stack:
        while True:
            try:
                part.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _move_away(target, stack)


def _move_away(target: Path, stack: ExitStack) -> None:
    """Rename ``target``; at the end of ``stack`` it is removed, or gets its name back if nothing took its place.

    Until then its name is not a part's: after a kill it may be all that is left, so no other writer removes it.
    """
    old = target.with_name(OLD.format(secrets.token_hex(8)))
    with suppress(FileNotFoundError):  # another writer was faster
        target.rename(old)
        stack.callback(_remove_or_restore, old, target)


def _remove_or_restore(old: Path, target: Path) -> None:
    if not target.exists():
        old.rename(target)
        return
    dead = old.with_suffix(".part")
    old.rename(dead)
    shutil.rmtree(dead, ignore_errors=True)  # another writer may remove it too


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
