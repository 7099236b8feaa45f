"""A merged model as one safetensors file, written tensor by tensor: for weights that no process can hold at once.

The library's own writers want every tensor before the first byte. Its format is a length in 8 bytes, a header in JSON
that may end in spaces, and the data (https://huggingface.co/docs/safetensors). So room is kept for the header, and it
is filled in at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

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
ENTRY = 256  # bytes of the header that one tensor needs beside its name, at most


def write_merged(path: Path, names: Iterable[str], values: Iterable[tuple[str, Tensor]], needed: Iterable[str]) -> None:
    """Write ``values`` into a safetensors file at ``path``, each as it comes; the file appears when it is whole.

    Args:
        path: where.
        names: of the tensors, or more.
        values: names and tensors, none of them kept.
        needed: names without which the file is of no use.

    Raises:
        RuntimeError: naming the first of those that ``values`` did not give, or what the format has no room for.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    room = sum(len(json.dumps(name)) + ENTRY for name in names) // 8 * 8 + 8
    header: dict[str, dict[str, object]] = {}
    try:
        with part.open("wb") as file:
            file.seek(8 + room)
            for name, value in values:
                if value.dtype not in DTYPES:
                    raise RuntimeError(f"`{name}` is of {value.dtype}, which safetensors has no name for.")
                start = file.tell() - 8 - room
                # A copy, as FSDP1 frees the memory that it gathered, which numpy would hold on to.
                data = value.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8).numpy()
                file.write(data.data)
                header[name] = {
                    "dtype": DTYPES[value.dtype],
                    "shape": list(value.shape),
                    "data_offsets": [start, start + data.nbytes],
                }
            missing = [name for name in needed if name not in header]
            if missing:
                raise RuntimeError(f"`{missing[0]}` could not be gathered, so the merged weights were not written.")
            text = json.dumps(header).encode()
            if len(text) > room:
                raise RuntimeError(
                    f"The header needs {len(text)} bytes and has {room}: `names` must hold every tensor's."
                )
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text.ljust(room))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
