"""Names of modules and parameters as the user wrote them, and the patterns that choose among them.

Wrappers (torch.compile, FSDP, checkpointing) put names of their own between; those are left out. A pattern is a suffix,
a glob or a regular expression.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean(name: str) -> str:
    """``name`` without what torch.compile, FSDP and checkpoint wrappers put between.

    Example:
        >>> clean("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def join(module: str, key: str) -> str:
    """The name of what a module holds under ``key``; the model itself has the empty name."""
    return f"{module}.{key}" if module else key


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its clean name; one that is used under two names comes twice, a wrapper not at all."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not WRAPPERS & module._modules.keys():
            yield clean(name), module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under its first clean name."""
    for name, parameter in model.named_parameters():
        yield clean(name), parameter


Value = TypeVar("Value")


def matches(name: str, pattern: str) -> bool:
    r"""Whether the dotted ``name`` is meant by ``pattern``.

    Example:
        >>> matches("net.layers.0.q_proj", "q_proj"), matches("net.layers.0.q_proj", "proj")
        (True, False)
        >>> matches("net.layers.0.q_proj", "layers.*.q_proj"), matches("net.layers.0.q_proj", r"re:.*[02]\.q_proj")
        (True, True)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def first_match(names: Iterable[str], patterns: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern that matches one of ``names``."""
    found = (value for pattern, value in patterns.items() if any(matches(name, pattern) for name in names))
    return next(found, default)


def covers(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name``, or a module that it lies in, is meant by one of ``patterns``."""
    parts = name.split(".")
    heads = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(matches(head, pattern) for pattern in patterns for head in heads)


def folded(name: str) -> str:
    """``name`` with its numbers as stars, unless it is nothing else: one layer stands for all."""
    return name if name.replace(".", "").isdigit() else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``names`` that look most like ``pattern``, numbers in them folded so that one layer stands for all."""
    stars = {folded(name): name for name in names}
    tails: dict[str, str] = {}
    for short in stars:
        for tail in (short, short.split(".")[-1]):
            tails.setdefault(tail, short)
    close = difflib.get_close_matches(pattern.removeprefix("re:"), tails, n=count * 2, cutoff=0.4)
    found = list(dict.fromkeys(tails[tail] for tail in close))[:count]
    return found or list(stars)[:count]
