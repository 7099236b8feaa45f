"""Copies of the module that callbacks keep, as averages do: a merge does to them what it does to the module.

An averaging callback exchanges parameters with its copy by position. So the two must have the same parameters, before
and after a merge.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.foreign import AVERAGED_CLASS, AVERAGED_MODEL, is_a
from lightning_lora.methods.base import Method
from lightning_lora.trainer.compatibility import gpu_of
from lightning_lora.trainer.patching import patch_method


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
            method.merge(copy, gpu_of(trainer))


def unmerge_copies(trainer: Any, module: nn.Module, method: Method) -> None:
    """Take the merge out of the copies; one whose weights were changed since then stays as it is."""
    for copy in kept_copies(trainer, module, method):
        if method.is_merged(copy):
            with suppress(ValueError):
                method.unmerge(copy, gpu_of(trainer))


def keep_averages_exact(trainer: Any, module: nn.Module, stack: ExitStack) -> None:
    """Until ``stack`` closes, keep averages from moving the base: ``0.9 * w + 0.1 * w`` need not be ``w``."""
    inside = [each for each in module.modules() if is_a(each, AVERAGED_CLASS)]
    for averaged in [*(getattr(callback, AVERAGED_MODEL, None) for callback in trainer.callbacks), *inside]:
        if getattr(averaged, "avg_fn", None) is not None:
            patch_method(stack, averaged, "avg_fn", equal_stays)


def equal_stays(average: Any, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    """The average of two equal numbers is that number."""
    return torch.where(averaged == current, averaged, average(averaged, current, count))
