"""Stand-ins for the values in a pickle, which say what a check needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DEEPEST = 100  # containers in containers
MOST_ENTRIES = 10_000_000  # of all containers; one that is used twice counts twice
# What makes a tensor: where its dtype is among the arguments, or -1 for that of its storage.
TENSORS = {
    "torch._utils._rebuild_tensor": -1,
    "torch._utils._rebuild_tensor_v2": -1,
    "torch._utils._rebuild_tensor_v3": 6,
}
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
TENSOR_CLASSES = ("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter")
# The classes of storages, by which a pickle says the dtype.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}


@dataclass(frozen=True)
class Global:
    """A class or function by name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The memory of tensors."""

    nbytes: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value that holds no other: a tensor, a device, a complex number."""


@dataclass(eq=False, slots=True)
class Container:
    """A list, a dict, a set or an object, and the values in it."""

    kind: str
    values: list[Any] = field(default_factory=list)


def itemsize_of(name: str) -> int | None:
    """The bytes of an element, by the name of its dtype or of its storage's class; ``None`` for another name."""
    module, _, last = name.rpartition(".")
    if last == "UntypedStorage":
        return 1
    dtype = getattr(torch, STORAGES.get(last, last), None) if module == "torch" else None
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None


def check_nesting(result: Any) -> None:
    """Raise where containers lie too deep, in themselves, or so often in each other that a walk would not end.

    A value that is used in several places is walked in each of them.
    """
    sizes: dict[int, tuple[int, int]] = {}  # entries below, and depth
    open_ones: set[int] = set()
    stack = [(result, False)]
    while stack:
        value, done = stack.pop()
        inside = [inner for inner in _values(value) if isinstance(inner, (Container, tuple))]
        if done:
            open_ones.discard(id(value))
            below = [sizes[id(inner)] for inner in inside]
            entries, depth = (
                len(_values(value)) + sum(size for size, _ in below),
                1 + max((d for _, d in below), default=0),
            )
            if depth > DEEPEST or entries > MOST_ENTRIES:
                raise ValueError("its values are nested too deeply")
            sizes[id(value)] = entries, depth
        elif id(value) in open_ones:
            raise ValueError("a value in it holds itself")
        elif id(value) not in sizes:
            open_ones.add(id(value))
            stack += [(value, True), *((inner, False) for inner in inside)]


def _values(value: Any) -> Any:
    return value.values if isinstance(value, Container) else value if isinstance(value, tuple) else ()


def check_no_hooks(hooks: Any) -> None:
    """Raise unless the hooks of a tensor are an empty dict."""
    if not isinstance(hooks, Container) or hooks.values:
        raise ValueError("a tensor has hooks, which torch.save does not write")


def allowed_by_the_user() -> set[str]:
    """The names of what ``torch.serialization.add_safe_globals`` was given."""
    entries = torch.serialization.get_safe_globals()
    return {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in entries}
