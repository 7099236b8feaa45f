"""Replace methods and attributes of one instance for one run, and restore them after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import CodeType
from typing import Any

_ABSENT = object()


class Wrapped:
    """A callable in place of ``original``: it calls ``replacement(original, *arguments)``.

    A copy or a pickle of the object gets the original back: the patch belongs to this run, not to the copy.
    """

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        self.original = original
        self.replacement = replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self.replacement(self.original, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Lightning's ``is_overridden`` compares it with the code of the parent class, and must see a difference."""
        return Wrapped.__call__.__code__

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (_itself, (self.original,))


def _itself(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def patch_method(stack: ExitStack, owner: object, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the method ``owner.name`` until ``stack`` closes.

    Not by ``functools.wraps``: Lightning's ``is_overridden`` looks through it.
    """
    patch_attribute(stack, owner, name, Wrapped(getattr(owner, name), replacement))


def patch_attribute(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set ``owner.name`` to ``value`` until ``stack`` closes, which restores what was on the instance before."""
    call_on_close(stack, _restore, owner, name, owner.__dict__.get(name, _ABSENT))
    object.__setattr__(owner, name, value)


def call_on_close(stack: ExitStack, restore: Callable[..., None], *args: Any) -> None:
    """Let ``stack`` call ``restore`` twice when it closes: an interrupt may cut the first call short."""
    for _ in range(2):
        stack.callback(restore, *args)


def _restore(owner: object, name: str, previous: object) -> None:
    if previous is _ABSENT:
        owner.__dict__.pop(name, None)
    else:
        object.__setattr__(owner, name, previous)
