"""Whether a directory can be written, asked before there is anything to write into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def why_unwritable(directory: str | os.PathLike[str]) -> str | None:
    """Why no file can be made in ``directory``, or the directory itself cannot; ``None`` if it can. Nothing is left.

    The first folder above that exists is tried, by a file without a name: permissions alone do not tell, as on a
    read-only disk.

    Example:
        >>> why_unwritable("/dev/null/adapter")
        '/dev/null is not a directory'
    """
    path = Path(directory).absolute()
    try:
        for folder in (path, *path.parents):
            if _is_there(folder):
                break
        if not folder.is_dir():
            return f"{folder} is not a directory"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{error.strerror} ({path})"


def _is_there(path: Path) -> bool:
    try:
        path.lstat()  # unlike `exists` it raises where a name is too long
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
