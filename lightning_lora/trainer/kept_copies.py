"""Copies of the module that callbacks keep, as averages do: a merge does to them what it does to the module.

An averaging callback exchanges parameters with its copy by position. So the two must have the same parameters, before
and after a merge.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from lightning_lora.methods.base import Method


def kept_copies(trainer: Any, module: nn.Module, method: Method) -> list[nn.Module]:
    """The modules that callbacks of ``trainer`` have as attributes, adapted or merged and no part of ``module``.

    Those in a list are snapshots of one moment, and stay as they were then.
    """
    own = set(map(id, module.modules()))
    values = (value for callback in trainer.callbacks for value in vars(callback).values())
    held = {id(each): each for each in values if isinstance(each, nn.Module)}
    apart = [each for each in held.values() if own.isdisjoint(map(id, each.modules()))]
    return [each for each in apart if method.present(each) is not None]


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
