"""Files as from a stranger: read without trust, written whole or not at all.

Nothing is unpickled, and what a file calls its tensors is looked up, never used as a path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.files.json_files import damaged, object_in, shown

LONGEST_HEADER = 100_000_000  # bytes, as in the library
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the CPU, and the strings in its header.

    Raises:
        ValueError: if it is damaged, or holds a dtype that no adapter has, NaN or infinity.
    """
    header = _header(path)
    metadata = header.pop("__metadata__", {})
    if not _all_strings(metadata):
        raise ValueError(f"`{path}` is damaged: what its header says of it must be strings, but is {shown(metadata)}.")
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"`{path}` holds {shown(name)} as {shown(dtype)}; an adapter is float32, bfloat16 or float16."
            )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    except (SafetensorError, OSError, OverflowError) as error:
        raise damaged(path, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{path}` holds NaN or infinity in {shown(name)}: the training that wrote it diverged.")
    return tensors, metadata


def _header(path: Path) -> dict[str, Any]:
    """The header as it is: the library's reader does not tell of a name that is there twice."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size - 8, LONGEST_HEADER):
            raise damaged(path, f"its header would have {size} bytes")
        return object_in(file.read(size), path)


def _all_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def write_together(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files beside those in ``directory`` and put all in their place: an error leaves the old ones.

    Args:
        directory: made if it is not there.
        writers: what writes each file, by its name; the largest last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = {directory / name: directory / f"{name}.{os.getpid()}.part" for name in writers}
    try:
        for path, part in parts.items():
            writers[path.name](part)
        _put_in_place(parts)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _put_in_place(parts: Mapping[Path, Path]) -> None:
    *small, _ = parts
    before = {path: path.read_bytes() if path.exists() else None for path in small}
    try:
        for path, part in parts.items():
            part.replace(path)
    except BaseException:
        for path, content in before.items():
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        raise
