"""All ranks must adapt alike: with other arguments on one of them the ranks would train apart, or wait for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import distributed

from lightning_lora.config import RunConfig
from lightning_lora.methods.base import Method
from lightning_lora.trainer.imports import MisconfigurationException

PATHS = ("init_from", "export", "merge_base")  # may differ, as every process may have a folder of its own


def check_same_on_ranks(method: Method, run_config: RunConfig) -> None:
    """Raise on every rank if the callbacks of two ranks have different arguments; every rank must call it.

    Raises:
        MisconfigurationException: naming the first argument that differs, with its values.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, arguments_of(method, run_config))
    check_alike(gathered)


def arguments_of(method: Method, run_config: RunConfig) -> dict[str, Any]:
    """What must be the same on every rank: of a path, whether there is one."""
    arguments = {**method.config.to_dict(), **run_config.to_dict()}
    return {key: value is not None if key in PATHS else value for key, value in arguments.items()}


def check_alike(arguments: Sequence[Mapping[str, Any]]) -> None:
    """Raise if two ranks have different arguments.

    Raises:
        MisconfigurationException: naming the first argument that differs, with its values.
    """
    for rank, of_rank in enumerate(arguments):
        for key, first in arguments[0].items():
            if of_rank.get(key) != first:
                values = "" if key in PATHS else f": {first!r} on rank 0 and {of_rank.get(key)!r} on rank {rank}"
                given = f" is given on one of the ranks 0 and {rank} only" if key in PATHS else " differs between ranks"
                raise MisconfigurationException(
                    f"`{key}`{given}{values}. All processes must adapt alike: give the callback the same arguments in "
                    "each, and let none depend on the rank."
                )
