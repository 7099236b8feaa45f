"""One safetensors file: read some rows at a time, and copied with other values for some tensors.

Its format is a length in 8 bytes, a header in JSON and the data (https://huggingface.co/docs/safetensors). The library
checks that the header fits the file; what lies where is read here, as the library maps a file whole into memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.files.merged_file import DTYPES

NAMED = {name: dtype for dtype, name in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 1 << 24  # bytes copied at once
SLAB = 1 << 22  # elements of a matrix in memory at once, but for one row


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Args:
        path: the file.
        name: of the tensor.
        dtype: in the words of safetensors.
        shape: its shape.
        start: where its data begins in the file.
        stop: where it ends.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch.

        Raises:
            ValueError: if torch has none of that name.
        """
        if self.dtype not in NAMED:
            raise ValueError(f"`{self.name}` in {self.path} is of {self.dtype}, which cannot be computed with.")
        return NAMED[self.dtype]

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor."""
        return _read(self.path, self.start, self.stop, self.torch_dtype()).view(self.shape)

    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as a matrix of rows: all dimensions but the first are one."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def slabs(self) -> Iterable[tuple[slice, Tensor]]:
        """Its rows, as a matrix, some at a time and in order."""
        height, width = self.matrix_shape()
        if not height * width:
            return
        dtype, rows = self.torch_dtype(), max(1, SLAB // width)
        for first in range(0, height, rows):
            some = slice(first, min(first + rows, height))
            start, stop = (self.start + row * width * dtype.itemsize for row in (some.start, some.stop))
            yield some, _read(self.path, start, stop, dtype).view(-1, width)


def _read(path: Path, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    raw = torch.empty(stop - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view, got = raw.numpy().data, 0
        while got < len(view):
            count = file.readinto(view[got:])
            if not count:
                raise ValueError(f"`{path}` ended while it was read: it was changed or cut since it was opened.")
            got += count
    return raw.view(dtype)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: ``tensors`` by name in the order of their data, and the strings of its ``metadata``."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> TensorFile:
    """Read the header of the safetensors file at ``path``.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is no safetensors file, or cut, or its header does not fit its data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is no file, and a safetensors file was expected there.")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{path}` is not a whole safetensors file ({error}): it is damaged, cut or of another kind. Fetch or "
            "write it again."
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    found = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.stop))
    return TensorFile(path, {tensor.name: tensor for tensor in found}, metadata)


def _stored(path: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), data + start, data + stop)


def write_like(
    source: TensorFile,
    path: Path,
    changed: Mapping[str, Iterable[Tensor]],
    added: Mapping[str, Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write a copy of ``source`` to ``path``, of the same names, dtypes and shapes, in which some tensors are others.

    Args:
        source: the file.
        path: where.
        changed: the values of these tensors instead, some rows at a time and in order; taken one after the other.
        added: tensors that ``source`` has not, written after its own.
        progress: called with the number of bytes after each that were written.
    """
    header, size = _header(source, added)
    with path.open("wb") as file, source.path.open("rb") as old:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in source.tensors.items():
            pieces = changed.get(name)
            for piece in _copied(old, tensor) if pieces is None else map(raw_bytes, pieces):
                file.write(piece)
                progress(len(piece))
        for tensor_added in added.values():
            file.write(raw_bytes(tensor_added))
        if file.tell() != 8 + len(header) + size:
            raise ValueError(f"`{source.path}` was changed while it was read: {path.name} came out of another size.")


def _header(source: TensorFile, added: Mapping[str, Tensor]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": source.metadata} if source.metadata else {}
    at = 0
    sizes = [(t.name, t.dtype, t.shape, t.stop - t.start) for t in source.tensors.values()]
    sizes += [(name, DTYPES[t.dtype], tuple(t.shape), t.nbytes) for name, t in added.items()]
    for name, dtype, shape, size in sizes:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return text.ljust(-(-len(text) // 8) * 8), at


def _copied(file: BinaryIO, tensor: StoredTensor) -> Iterable[bytes]:
    file.seek(tensor.start)
    left = tensor.stop - tensor.start
    while left:
        piece = file.read(min(left, CHUNK))
        if not piece:
            raise ValueError(f"`{tensor.path}` ended while it was read: it was changed or cut since it was opened.")
        left -= len(piece)
        yield piece


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
