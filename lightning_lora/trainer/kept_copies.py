"""Copies of the module that callbacks keep, as averages or snapshots: a merge does to them what it does to the module.

An averaging callback exchanges parameters with its copy by position. So the two must have the same parameters, before
and after a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_lora.methods.base import Method


def kept_copies(trainer: Any, module: nn.Module, method: Method) -> list[nn.Module]:
    """The modules that callbacks of ``trainer`` hold, which are adapted or merged and no part of ``module``."""
    own = set(map(id, module.modules()))
    held = {id(each): each for callback in trainer.callbacks for each in _modules_in(vars(callback).values())}
    apart = [each for each in held.values() if own.isdisjoint(map(id, each.modules()))]
    return [each for each in apart if method.present(each) is not None]


def _modules_in(values: Iterable[Any]) -> Iterator[nn.Module]:
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            inside = value.values() if isinstance(value, dict) else value
            yield from (each for each in inside if isinstance(each, nn.Module))


def merge_copies(trainer: Any, module: nn.Module, method: Method) -> None:
    """Merge the live adapters of the copies."""
    for copy in kept_copies(trainer, module, method):
        if method.is_adapted(copy) and method.never_merges(copy) is None and method.cannot_write(copy) is None:
            method.merge(copy)


def unmerge_copies(trainer: Any, module: nn.Module, method: Method) -> None:
    """Take the merge out of the copies; one whose weights were changed since then stays as it is."""
    for copy in kept_copies(trainer, module, method):
        if method.is_merged(copy):
            with suppress(ValueError):
                method.unmerge(copy)
