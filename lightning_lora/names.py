"""Names of modules and parameters as the user wrote them, and patterns that choose among them.

Wrappers (torch.compile, FSDP, activation checkpointing) insert names of their own, which are removed here. A pattern is
a suffix, a glob or a regular expression.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from fnmatch import fnmatchcase
from itertools import islice
from typing import TypeVar

from torch import nn

from lightning_lora.foreign import WRAPPERS
from lightning_lora.patterns.expression import expression


def clean(name: str) -> str:
    """``name`` without the parts that torch.compile, FSDP and checkpoint wrappers insert.

    Example:
        >>> clean("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    parts = name.split(".")
    return name if WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in WRAPPERS)


def join(module: str, key: str) -> str:
    """The name of what ``module`` holds under ``key``. The model itself has the empty name."""
    return f"{module}.{key}" if module else key


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of torch.compile, FSDP or a checkpoint wrapper, not the user's module in it."""
    return not WRAPPERS.isdisjoint(module._modules.keys())  # TorchScript's mapping does not iterate


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its clean name. One that is used under two names comes twice; wrappers are left out."""
    for name, module in every_module(model):
        if not is_wrapper(module):
            yield clean(name), module


def every_module(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The list of ``model.named_modules(remove_duplicate=False)``.

    A run lists the modules of its model dozens of times. The generators of torch take several times as long, as each
    module passes through one generator for every level that it lies at.
    """
    modules: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        modules.append((name, module))
        for key, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return modules


def each_module_once(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The list of ``model.named_modules()``: each module under its first name."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for name, module in every_module(model):
        first.setdefault(id(module), (name, module))
    return list(first.values())


def named_parameters(
    model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under its first clean name.

    Args:
        model: any module.
        modules: :func:`each_module_once` of it, if the caller has that already.
    """
    if type(model).named_parameters is not nn.Module.named_parameters:  # the user's own choice of parameters
        yield from ((clean(name), parameter) for name, parameter in model.named_parameters())
        return
    seen: set[int] = set()
    for name, module in each_module_once(model) if modules is None else modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield clean(join(name, key)), parameter


Value = TypeVar("Value")
MOST_COMPARED, LONGEST_COMPARED = 5000, 200  # names, and characters of one


def matches(name: str, pattern: str) -> bool:
    r"""Whether ``pattern`` chooses the dotted ``name``; of regular expressions a checked subset is allowed.

    Raises:
        ValueError: saying what is not allowed in a regular expression.

    Example:
        >>> matches("net.layers.0.q_proj", "q_proj"), matches("net.layers.0.q_proj", "proj")
        (True, False)
        >>> matches("net.layers.0.q_proj", "layers.*.q_proj"), matches("net.layers.0.q_proj", r"re:.*[02]\.q_proj")
        (True, True)
    """
    if pattern.startswith("re:"):
        return expression(pattern.removeprefix("re:")).fullmatch(name)
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def first_match(names: Iterable[str], patterns: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern that matches one of ``names``."""
    matching = (value for pattern, value in patterns.items() if any(matches(name, pattern) for name in names))
    return next(matching, default)


def covers(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of ``patterns`` chooses ``name`` or a module that it lies in."""
    parts = name.split(".")
    heads = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(matches(head, pattern) for pattern in patterns for head in heads)


def folded(name: str) -> str:
    """``name`` with its numbers as stars, so that one layer stands for all; a name of numbers alone stays.

    Example:
        >>> folded("layers.3.q_proj"), folded("0")
        ('layers.*.q_proj', '0')
    """
    return name if name.replace(".", "").isdigit() else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``count`` and the ``noun``, in its plural unless there is one.

    Example:
        >>> counted(1, "layer"), counted(1200, "layer"), counted(0, "matrix", "matrices")
        ('1 layer', '1,200 layers', '0 matrices')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def it_or_them(names: Sized) -> str:
    """The pronoun for ``names`` in a sentence.

    Example:
        >>> it_or_them(["head"]), it_or_them(["head", "body"])
        ('it', 'them')
    """
    return "it" if len(names) == 1 else "them"


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``names`` that look most like ``pattern``; of names that differ by a number only one is given.

    Comparing takes the time of both lengths, and names may come from a stranger: long ones, and those after the first
    thousands, are left out.
    """
    stars = {folded(name): name for name in islice(names, MOST_COMPARED) if len(name) <= LONGEST_COMPARED}
    tails: dict[str, str] = {}
    for short in stars:
        for tail in (short, short.split(".")[-1]):
            tails.setdefault(tail, short)
    close = difflib.get_close_matches(pattern.removeprefix("re:")[:LONGEST_COMPARED], tails, n=count * 2, cutoff=0.4)
    similar = list(dict.fromkeys(tails[tail] for tail in close))[:count]
    return similar or list(stars)[:count]
