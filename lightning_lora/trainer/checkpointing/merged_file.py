"""The merged weights in one safetensors file, written at the end of ``fit`` a tensor at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lightning_lora.distributed.sharded import fsdp1_units
from lightning_lora.files.safetensors_writing import write_merged
from lightning_lora.files.writable import why_unwritable
from lightning_lora.foreign import COMPILED, WRAPPERS
from lightning_lora.methods.base import Method
from lightning_lora.model.state import real_keys
from lightning_lora.trainer.imports import rank_zero_warn


def check_merged_file(trainer: Any, method: Method, module: Any, path: str) -> None:
    """Raise before the first step if the file could not be written after the last; every rank must call it.

    Raises:
        ValueError: naming what is in the way.
    """
    reason = method.never_merges(module)
    if reason is not None:
        raise ValueError(f"`merged={path!r}` cannot be written. {reason}")
    if Path(path).is_dir():
        raise ValueError(f"`merged={path!r}` must be a file, but is a directory: name a file in it.")
    reason = trainer.strategy.broadcast(why_unwritable(Path(path).parent) if trainer.is_global_zero else None)
    if reason is not None:
        raise ValueError(f"`merged={path!r}` cannot be written: {reason}. Name a file that can be.")


def write_merged_file(trainer: Any, method: Method, needed: Iterable[str], path: str) -> bool:
    """Write the merged model to ``path``, tied tensors once; whether it was written. Every rank must call it.

    The metadata names for every tied tensor the one that it equals, as ``safetensors.torch.save_model`` writes it. An
    error becomes a warning: at the end of a run the module must not be lost by it.
    """
    try:
        _write(trainer, method, needed, Path(path), tied_once=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).rstrip(".")
        rank_zero_warn(f"`merged={path!r}` was not written: {reason}. Use torch.save(merged_state_dict(module), ...).")
        return False
    return True


def export_merged(trainer: Any, method: Method, needed: Iterable[str]) -> Path:
    """Write the merged weights into the folder of the checkpoints, gathered a unit at a time; every rank must call it.

    Args:
        trainer: the Trainer.
        method: what its module is adapted by.
        needed: names of parameters that must be in it.
    """
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    path = Path(trainer.strategy.broadcast(str(folder))) / "merged.safetensors"
    _write(trainer, method, needed, path, tied_once=False)
    return path


def _write(trainer: Any, method: Method, needed: Iterable[str], path: Path, tied_once: bool) -> None:
    outermost = trainer.strategy.model
    module = outermost if fsdp1_units(outermost) else trainer.lightning_module
    keys = {name: _key_of_state_dict(key) for name, key in real_keys(module).items()}
    values, metadata = method.merged_values(module), {"format": "pt"} if tied_once else {}
    named = _once(values, keys, metadata) if tied_once else ((keys[name], value) for name, value in values)
    try:
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_merged(path, keys.values(), named, [keys[name] for name in needed], metadata)
    finally:
        deque(values, maxlen=0)  # the other ranks wait for this one, even where it failed
    trainer.strategy.barrier()


def _key_of_state_dict(key: str) -> str:
    """The key that ``state_dict`` gives for ``key``: wrappers leave their own names out, but for the compiler's."""
    return ".".join(part for part in key.split(".") if part == COMPILED or part not in WRAPPERS)


def _once(
    values: Iterable[tuple[str, Tensor]], keys: dict[str, str], ties: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """``values`` under ``keys``, each object once: tied tensors follow each other. Other names go into ``ties``."""
    first, previous = "", None
    for name, value in values:
        if value is previous:
            ties[keys[name]] = first
        else:
            first, previous = keys[name], value
            yield first, value
