"""A rehearsal of a pickle that ``torch.load(weights_only=True)`` is to read: is it bounded, and do its tensors exist?

torch allows harmless classes only, but it believes their arguments: a tensor of more elements than its storage has
makes it allocate them, or read memory that is not the file's; keys of one hash take quadratic time, and deep tuples end
the process. Here the operations of the pickle are followed, and nothing of torch is called.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

from lightning_lora.files.json_files import shown
from lightning_lora.files.pickle_values import (
    DEEPEST,
    PARAMETERS,
    TENSOR_CLASSES,
    TENSORS,
    WITH_ATTRIBUTES,
    Container,
    Global,
    Scalar,
    Storage,
    allowed_by_the_user,
    check_nesting,
    check_no_hooks,
    itemsize_of,
)

MOST_OPERATIONS = 10_000_000
MOST_CONTAINERS = 1_000_000  # lists, dicts and tensors
MOST_ODD_KEYS = 10_000  # keys other than strings and small integers: an author can give many of them one hash
EXPANDED = 1 << 28  # bytes that tensors may have in addition to those in the file, as expanded ones do


class ObjectRefusedError(ValueError):
    """The file holds an object that is no plain data; the message is the name of its class or function."""


def check_pickle(text: bytes, storages: Mapping[str, int]) -> None:
    """Raise unless ``text`` is the pickle of plain data and of tensors that lie in ``storages``.

    Args:
        text: the whole pickle.
        storages: the size in bytes of each record that holds a storage.

    Raises:
        ObjectRefusedError: if it holds objects that torch would refuse, or tensors that are not dense.
        ValueError: if it is damaged, too large or too deep.
    """
    rehearsal = Rehearsal(storages)
    try:
        result = rehearsal.run(text)
    except ObjectRefusedError:
        raise
    except (IndexError, KeyError, TypeError, AttributeError) as error:  # an operation lacks what it works on
        raise ValueError("its pickle is damaged") from error
    check_nesting(result)


class Rehearsal:
    """Follows the operations of a pickle on stand-ins for its values.

    Args:
        storages: the size in bytes of each storage.
    """

    def __init__(self, storages: Mapping[str, int]) -> None:
        self.sizes, self.itemsizes = storages, dict[str, int]()
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.odd_keys = self.tensor_bytes = self.containers = 0
        self.most_bytes = sum(storages.values()) + EXPANDED
        self.allowed = allowed_by_the_user()
        self.operations: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1"), self.push),
            "SHORT_BINSTRING": self.push,
            "NONE": self.push,
            "NEWTRUE": lambda _: self.push(True),
            "NEWFALSE": lambda _: self.push(False),
            "EMPTY_TUPLE": lambda _: self.push(()),
            "EMPTY_LIST": lambda _: self.push_container("list"),
            "EMPTY_DICT": lambda _: self.push_container("dict"),
            "EMPTY_SET": lambda _: self.push_container("set"),
            "MARK": lambda _: self.mark(),
            "TUPLE": lambda _: self.push(tuple(self.pop_to_mark())),
            "TUPLE1": lambda _: self.push_tuple(1),
            "TUPLE2": lambda _: self.push_tuple(2),
            "TUPLE3": lambda _: self.push_tuple(3),
            "APPEND": lambda _: self.add_to("list", [self.stack.pop()]),
            "APPENDS": lambda _: self.add_to("list", self.pop_to_mark()),
            "SETITEM": lambda _: self.set_items([self.stack.pop(), self.stack.pop()][::-1]),
            "SETITEMS": lambda _: self.set_items(self.pop_to_mark()),
            "BINPUT": self.remember,
            "LONG_BINPUT": self.remember,
            "BINGET": lambda index: self.push(self.memo[index]),
            "LONG_BINGET": lambda index: self.push(self.memo[index]),
            "GLOBAL": lambda name: self.push(self.named(*name.split(" ", 1))),
            "BINPERSID": lambda _: self.push(self.storage(self.stack.pop())),
            "REDUCE": lambda _: self.reduce(),
            "NEWOBJ": lambda _: self.new_object(),
            "BUILD": lambda _: self.build(),
            "PROTO": lambda _: None,
            "STOP": lambda _: None,
        }

    def run(self, text: bytes) -> Any:
        """The stand-in for the value of the whole pickle."""
        for number, (operation, argument, _) in enumerate(pickletools.genops(text)):
            if number > MOST_OPERATIONS:
                raise ValueError(f"its pickle has more than {MOST_OPERATIONS:,} operations")
            act = self.operations.get(operation.name)
            if act is None:
                raise ValueError(f"its pickle has the operation {operation.name}, which torch.save does not write")
            act(argument)
        if len(self.stack) != 1:
            raise ValueError("its pickle is damaged")
        return self.stack[0]

    def push(self, value: Any) -> None:
        """A value on the stack."""
        self.stack.append(value)

    def push_container(self, kind: str) -> None:
        """An empty container on the stack."""
        self.count_container()
        self.push(Container(kind))

    def count_container(self) -> None:
        """Raise where there are so many that all of them take gigabytes."""
        self.containers += 1
        if self.containers > MOST_CONTAINERS:
            raise ValueError(f"its pickle has more than {MOST_CONTAINERS:,} lists, dicts and tensors")

    def mark(self) -> None:
        """What follows, until it is taken, belongs together."""
        self.marked.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        """What came since the mark."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def push_tuple(self, count: int) -> None:
        """The last ``count`` values as a tuple."""
        values = [self.stack.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))

    def remember(self, index: int) -> None:
        """Give the last value a number, by which it is used again."""
        self.memo[index] = self.stack[-1]

    def add_to(self, kind: str, values: Iterable[Any]) -> None:
        """Values into the last container, which is of this kind."""
        container = self.stack[-1]
        if not isinstance(container, Container) or container.kind != kind:
            raise ValueError("its pickle is damaged")
        container.values += values

    def set_items(self, items: list[Any]) -> None:
        """Keys and values, in turn, into the last dict."""
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values):
            raise ValueError("its pickle is damaged")
        self.check_keys(keys)
        self.add_to("dict", values)

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raise at keys that cannot be compared in bounded time."""
        for key in keys:
            if isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 31):
                continue
            parts = key if isinstance(key, tuple) else (key,)
            self.odd_keys += len(parts)
            plain = all(part is None or isinstance(part, (str, bytes, int, float, Global, Scalar)) for part in parts)
            if not plain or self.odd_keys > MOST_ODD_KEYS:
                raise ValueError("it has keys of a dict that are no strings and small integers, or too many others")

    def named(self, module: str, last: str) -> Global:
        """The class or function of this name, if torch knows it as harmless or the user does."""
        # A pickle of protocol 2 has Python 2's names.
        module, last = NAME_MAPPING.get((module, last), (IMPORT_MAPPING.get(module, module), last))
        name = f"{module}.{last}"
        known = name in (*ALLOWED, *TENSORS, *PARAMETERS, *TENSOR_CLASSES, WITH_ATTRIBUTES) or name in self.allowed
        if not known and itemsize_of(name) is None:
            raise ObjectRefusedError(name.removeprefix("builtins."))
        return Global(name)

    def storage(self, persistent: Any) -> Storage:
        """The storage that a tensor names: its record has exactly its size."""
        kind, of, key, device, numel = persistent
        itemsize = itemsize_of(of.name) or 0
        if not isinstance(device, str):
            raise ValueError("its pickle is damaged")
        if kind != "storage" or numel * itemsize != self.sizes[key] or numel < 0:
            raise ValueError(f"the storage {shown(key)} is of another size than its record")
        if self.itemsizes.setdefault(key, itemsize) != itemsize:
            raise ValueError(f"the storage {shown(key)} is of two types")
        return Storage(self.sizes[key], itemsize)

    def reduce(self) -> None:
        """Call what is on the stack."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.count_container()
        self.push(self.called(function.name, arguments))

    def called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The stand-in for what the function or class ``name`` returns."""
        if name in TENSORS:
            return self.tensor(arguments, TENSORS[name])
        if name in PARAMETERS:
            check_no_hooks(arguments[2])
            return Container("object", list(arguments))
        if name == WITH_ATTRIBUTES and arguments[1].name in (*TENSOR_CLASSES, *self.allowed):
            return Container("object", [self.called(arguments[0].name, arguments[2]), *arguments[3:]])
        if name in ALLOWED:
            return ALLOWED[name](self, *arguments)
        if name in self.allowed:
            return Container("object", list(arguments))
        raise ObjectRefusedError(name)

    def tensor(self, arguments: tuple[Any, ...], dtype_at: int) -> Scalar:
        """A tensor that lies in its storage."""
        storage, offset, size, stride = arguments[:4]
        itemsize = storage.itemsize if dtype_at < 0 else itemsize_of(arguments[dtype_at].name) or 0
        if len(arguments) > 5:
            check_no_hooks(arguments[5])
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > DEEPEST or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor has a shape that no tensor has")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if prod(size) and (last + 1) * itemsize > storage.nbytes:
            raise ValueError(f"a tensor of shape {shown(size)} is larger than its record")
        self.tensor_bytes += prod(size) * itemsize
        if self.tensor_bytes > self.most_bytes:
            raise ValueError(f"a tensor of shape {shown(size)} repeats few values more often than any model does")
        return Scalar()

    def new_object(self) -> None:
        """An object of a class that the user allowed."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls.name not in self.allowed:
            raise ObjectRefusedError(cls.name)
        self.push(Container("object", list(arguments)))

    def build(self) -> None:
        """Attributes of the last object: an OrderedDict's (a state dict has `_metadata`), or an allowed one's."""
        state, thing = self.stack.pop(), self.stack[-1]
        if not isinstance(thing, Container) or thing.kind == "list":
            raise ValueError("its pickle sets attributes of what has none")
        thing.values.append(state)


def _ordered_dict(rehearsal: Rehearsal) -> Container:
    return Container("dict")


def _counter(rehearsal: Rehearsal, *counts: Container) -> Container:
    return Container("dict", list(counts))


def _set(rehearsal: Rehearsal, members: Container) -> Container:
    rehearsal.check_keys(members.values)
    return Container("set")


def _scalar(rehearsal: Rehearsal, *arguments: Any) -> Scalar:
    if not all(isinstance(value, (str, float, int)) for value in arguments):
        raise ValueError("its pickle is damaged")
    return Scalar()


def _encoded(rehearsal: Rehearsal, text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):  # as torch.save writes; others make the text longer each time
        raise ValueError("its pickle is damaged")
    return text.encode("latin1")


def _bytearray(rehearsal: Rehearsal, *arguments: Any) -> Scalar:
    if arguments and not isinstance(arguments[0], (str, bytes)):  # of a number it makes as many zeros
        raise ValueError("its pickle is damaged")
    return Scalar()


ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.complex": _scalar,
    "builtins.bytearray": _bytearray,
    "torch.Size": lambda _, sizes: sizes,
    "torch.device": _scalar,
    "torch.serialization._get_layout": _scalar,
    "_codecs.encode": _encoded,
}
