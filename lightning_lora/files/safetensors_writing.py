"""The writer of safetensors files: tensors as they come, or a copy of a file in which some tensors change.

The library's own writers need every tensor before the first byte, and they write the strings of the metadata in any
order, so that equal calls give unequal files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_lora.files.atomic import atomic_write
from lightning_lora.files.in_turns import write_behind
from lightning_lora.files.safetensors import DTYPES, METADATA, StoredTensor, TensorFile

ENTRY = 256  # bytes of the header that one tensor needs in addition to its name, at most
CHUNK = 1 << 24  # bytes copied at once
Size = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and the strings of ``metadata``: equal arguments give equal bytes.

    Args:
        path: file to write, not atomically.
        tensors: by name, on the CPU; those with the longest elements come first, so that all are aligned.
        metadata: strings for the header.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    sizes = [_size(name, tensors[name]) for name in ordered]
    with path.open("wb") as file:
        file.write(_header(sizes, dict(sorted(metadata.items()))))
        for name in ordered:
            file.write(_raw_bytes(tensors[name]))


def write_merged(
    path: Path,
    names: Iterable[str],
    values: Iterable[tuple[str, Tensor]],
    needed: Iterable[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``values`` into a safetensors file at ``path``, each as it comes; the file appears when it is complete.

    For weights that no process can hold at once. Space for the header is kept, and filled in at the end.

    Args:
        path: file to write.
        names: names of the tensors, or more.
        values: names and tensors; none is kept in memory.
        needed: names without which the file is of no use.
        metadata: strings for the header, read when all values are written; names of tensors, and short ones.

    Raises:
        RuntimeError: naming the first needed tensor that ``values`` lacks, or one that the format has no place for.
    """
    room = sum(len(json.dumps(name)) + ENTRY for name in names) // 8 * 8 + 8 + (ENTRY if metadata else 0)
    sizes: list[Size] = []
    with atomic_write(path) as part, part.open("wb") as file:
        file.seek(8 + room)
        for name, value in values:
            if value.dtype not in DTYPES:
                raise RuntimeError(f"`{name}` is of {value.dtype}, which safetensors has no name for.")
            # A copy, as FSDP1 frees the memory that it gathered, which numpy would hold on to.
            value = value.detach().to("cpu", copy=True)
            file.write(_raw_bytes(value))
            sizes.append(_size(name, value))
        written = {name for name, *_ in sizes}
        missing = [name for name in needed if name not in written]
        if missing:
            raise RuntimeError(f"`{missing[0]}` could not be gathered, so the merged weights were not written.")
        header = _header(sizes, metadata or {}, room)
        if len(header) > 8 + room:
            raise RuntimeError(
                f"The header needs {len(header) - 8} bytes and has {room}: `names` must hold every tensor's."
            )
        file.seek(0)
        file.write(header)


def write_like(
    source: TensorFile,
    path: Path,
    changed: Mapping[str, Iterable[Tensor]],
    added: Mapping[str, Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write a copy of ``source`` with the same names, dtypes and shapes, in which some tensors have other values.

    Args:
        source: the file to copy.
        path: file to write, not atomically.
        changed: new values of some tensors, a few rows at a time and in order; read one tensor after the other. While
            one piece is computed, the piece before it is written, and those before that may be overwritten.
        added: tensors that ``source`` lacks, written after its own.
        progress: called with a number of bytes each time some were written.

    Raises:
        ValueError: if ``source`` was changed since it was opened.
    """
    sizes = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in source.tensors.values()]
    sizes += [_size(name, tensor) for name, tensor in added.items()]
    header = _header(sizes, source.metadata)
    with path.open("wb") as file, source.path.open("rb") as old:
        with write_behind(file) as write:
            write(header)
            for name, tensor in source.tensors.items():
                pieces = changed.get(name)
                for piece in _copied(old, tensor) if pieces is None else map(_raw_bytes, pieces):
                    write(piece)
                    progress(len(piece))
            for value in added.values():
                write(_raw_bytes(value))
        if file.tell() != len(header) + sum(size for *_, size in sizes):
            raise ValueError(f"`{source.path}` was changed while it was read: {path.name} came out of another size.")


def _size(name: str, tensor: Tensor) -> Size:
    return name, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes


def _header(sizes: Iterable[Size], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """Length and header of a file with these tensors in this order, padded with spaces to ``room`` or to 8 bytes."""
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape, size in sizes:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries).encode()
    text = text.ljust(max(room, -(-len(text) // 8) * 8))
    return len(text).to_bytes(8, "little") + text


def _copied(file: BinaryIO, tensor: StoredTensor) -> Iterable[bytes]:
    file.seek(tensor.start)
    left = tensor.nbytes
    while left:
        piece = file.read(min(left, CHUNK))
        if not piece:
            raise ValueError(f"`{tensor.path}` ended while it was read: it was changed or cut since it was opened.")
        left -= len(piece)
        yield piece


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, without a copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
