"""The reader of safetensors files: the header is checked, and tensors are read when they are asked for.

The format is a length in 8 bytes, a header in JSON and the data (https://huggingface.co/docs/safetensors). The library
checks that header and data fit. The header is read here all the same: the library hides a name that is there twice, and
it maps a file into memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.files.json_files import is_name, parse_object, shown

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
IN_ADAPTERS = {*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL"}
METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000  # bytes, as in the library
SLAB = 1 << 22  # elements of a matrix in memory at once, unless one row has more


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Args:
        path: the file.
        name: name of the tensor.
        dtype: its dtype as safetensors calls it.
        shape: its shape.
        start: position in the file where its data begins.
        stop: position where its data ends.
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
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(f"`{self.name}` in {self.path} is of {self.dtype}, which cannot be computed with.")
        return TORCH_DTYPES[self.dtype]

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of its data."""
        return self.stop - self.start

    def read(self) -> Tensor:
        """The tensor."""
        return _read(self.path, self.start, self.stop, self.torch_dtype()).view(self.shape)

    def read_finite(self) -> Tensor:
        """The tensor, which may hold neither NaN nor infinity.

        Raises:
            ValueError: if it does.
        """
        value = self.read()
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"`{self.path}` holds NaN or infinity in {shown(self.name)}: the training that wrote it diverged."
            )
        return value

    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as a matrix: the first dimension by all others."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def row_slices(self) -> Iterable[slice]:
        """Its rows as a matrix, in order: as many at a time as may be in memory at once."""
        height, width = self.matrix_shape()
        if height * width:
            count = max(1, SLAB // width)
            yield from (slice(first, min(first + count, height)) for first in range(0, height, count))

    def slabs(self) -> Iterable[tuple[slice, Tensor]]:
        """Its rows as a matrix, some at a time and in order."""
        dtype, (_, width) = self.torch_dtype(), self.matrix_shape()
        for rows in self.row_slices():
            start, stop = (self.start + row * width * dtype.itemsize for row in (rows.start, rows.stop))
            yield rows, _read(self.path, start, stop, dtype).view(-1, width)


def value_of(tensor: Tensor | StoredTensor) -> Tensor:
    """``tensor`` itself, or its value if it is in a file."""
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def dtype_of(tensor: Tensor | StoredTensor) -> torch.dtype:
    """The dtype of ``tensor``, in memory or in a file."""
    return tensor.torch_dtype() if isinstance(tensor, StoredTensor) else tensor.dtype


def _read(path: Path, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    raw = torch.empty(stop - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view, filled = raw.numpy().data, 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise ValueError(f"`{path}` ended while it was read: it was changed or cut since it was opened.")
            filled += count
    return raw.view(dtype)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: ``tensors`` by name in the order of their data, and the strings of its ``metadata``."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> TensorFile:
    """Read and check the header of the safetensors file at ``path``.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is no safetensors file, or cut, its header does not fit its data, or a name is there twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is no file, and a safetensors file was expected there.")
    header, data = _header(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, OverflowError) as error:
        raise _damaged(path, error) from error
    metadata = header.pop(METADATA, None) or {}
    for name in header:
        if not is_name(name):
            raise ValueError(f"`{path}` holds {shown(name)}, which is no name of a tensor.")
    tensors = [_stored(path, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    return TensorFile(path, {tensor.name: tensor for tensor in tensors}, metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the position in the file where the data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size - 8, LONGEST_HEADER):
            raise _damaged(path, f"its header would have {size} bytes")
        try:
            return parse_object(file.read(size)), 8 + size
        except ValueError as error:
            raise _damaged(path, error) from error


def _stored(path: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), data + start, data + stop)


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"`{path}` is not a whole safetensors file ({shown(str(reason))}): it is damaged, cut or of another kind. Copy "
        "or download it again."
    )


def check_dtypes(file: TensorFile) -> None:
    """Raise if a tensor is of a dtype that no adapter has.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in file.tensors.items():
        if tensor.dtype not in IN_ADAPTERS:
            raise ValueError(
                f"`{file.path}` holds {shown(name)} as {shown(tensor.dtype)}; an adapter is float32, bfloat16 or "
                "float16."
            )
