"""``init_from`` and ``export``: adapters from other runs and tools at the start, and for them at the end."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from lightning_lora.files.writable import why_unwritable
from lightning_lora.methods.base import Method
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import Fingerprint, shape_alone
from lightning_lora.model.written import set_written, written_parameters
from lightning_lora.names import clean
from lightning_lora.peft_format.directories import directories_in, is_adapter_directory
from lightning_lora.peft_format.load import load_adapter, load_directories
from lightning_lora.peft_format.save import check_saveable, save_adapter
from lightning_lora.trainer.checkpointing import contents, reading
from lightning_lora.trainer.checkpointing.adapters_by_name import adapters_in, with_adapters
from lightning_lora.trainer.checkpointing.checkpoint_io import is_written_here
from lightning_lora.trainer.compatibility import best_checkpoints
from lightning_lora.trainer.imports import rank_zero_info, rank_zero_warn
from lightning_lora.trainer.watching.frozen_facts import LATE, WRITTEN, names_in
from lightning_lora.trainer.watching.liveness import listed


def start_from(module: nn.Module, path: str, method: Method, base: Fingerprint) -> None:
    """Give the adapters of ``module`` the values in a PEFT directory, or in the checkpoint of another run.

    Raises:
        ValueError: if they are of another configuration or base, damaged, or the adapters have no place yet.
    """
    empty = next((name for name, parameter in method.added_parameters(module) if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"`init_from={path!r}` comes before `{empty}` has memory: the model is on the meta device. Load the base "
            "in `configure_model`, or resume with `ckpt_path`."
        )
    if not Path(path).exists():
        raise FileNotFoundError(f"`init_from={path!r}` is not there: give a PEFT directory, or a checkpoint of a run.")
    if Path(path).is_dir():
        _start_from_directory(module, Path(path), method)
        return
    checkpoint = reading.read(reading.on_cpu, path, not is_written_here(path), "init_from")
    written, trained_on = reading.facts_in(checkpoint, path, "init_from")
    reading.check_config(written, path, method, "init_from")
    set_written(module, names_in(checkpoint[contents.KEY], WRITTEN))
    base.update((name, shape_alone(parameter)) for name, parameter in written_parameters(module))
    reading.check_base(trained_on, base, path, "init_from", names_in(checkpoint[contents.KEY], LATE))
    state = {clean(key): value for key, value in checkpoint["state_dict"].items()}
    if isinstance(method, LoRAMethod):
        taken, held = [config.name for config in method.config.each()], adapters_in(checkpoint)
        check_has_all(taken, held, path)
        state = with_adapters(state, module, held, taken)
    method.load(module, state)


def _start_from_directory(module: nn.Module, path: Path, method: Method) -> None:
    """Load the adapters that the run trains: from ``path`` itself, or from its sub-directories."""
    trained = [config.name for config in method.config.each()] if isinstance(method, LoRAMethod) else []
    several = directories_in(path)
    if several:
        check_has_all(trained, several, str(path))
        load_directories(module, {name: several[name] for name in trained})
    elif len(trained) > 1 and is_adapter_directory(path):
        raise ValueError(
            f"`init_from={str(path)!r}` holds one adapter, and this run trains {', '.join(map(repr, trained))}. Give a "
            "directory with a sub-directory for each, as save_adapter(model, directory) writes them."
        )
    else:
        load_adapter(module, path, *trained[:1])


def check_has_all(names: Iterable[str], present: Collection[str], path: str) -> None:
    """Raise if one of the adapters ``names`` is not in what ``init_from`` names.

    Raises:
        ValueError: naming the first.
    """
    missing = next((name for name in names if name not in present), None)
    if missing is not None:
        held = ", ".join(f"`{name}`" for name in sorted(present))
        raise ValueError(
            f"`init_from={path!r}` has no adapter {missing!r}: it holds {held}. Name the adapters of the run as they "
            "are called there."
        )


def check_export(trainer: Any, module: nn.Module, directory: str) -> None:
    """Raise before the first step if the adapters could not be written after the last; every rank must call it.

    Raises:
        ValueError: naming what PEFT's format has no place for, or why ``directory`` cannot be written.
    """
    if Path(directory).is_file():
        raise ValueError(f"`export={directory!r}` must be a directory, but is a file.")
    reason = trainer.strategy.broadcast(why_unwritable(directory) if trainer.is_global_zero else None)
    if reason is not None:
        raise ValueError(f"`export={directory!r}` cannot be written: {reason}. Name a directory that can be.")
    try:
        to_know = check_saveable(module)
    except ValueError as error:
        raise ValueError(
            f"`export={directory!r}` cannot be written: {error} Without `export` the run trains and merges it all the "
            "same."
        ) from error
    if to_know is not None:
        rank_zero_info(f"`export={directory!r}`: {to_know}")


def why_not_exportable(module: nn.Module, method: Method, directory: str, moving: Collection[str]) -> str | None:
    """Why the adapters could not be written at the end, where other code moves parameters of the base.

    Args:
        module: that trains.
        method: what it is adapted by.
        directory: the argument ``export``.
        moving: the frozen parameters that other code moves.
    """
    try:
        to_know = check_saveable(module)
    except ValueError as error:
        adapted = {name.rpartition(".")[0] for name, _ in method.adapted_weights(module).values()}
        both = sorted(adapted & {name.rpartition(".")[0] for name in moving})
        why = f"PEFT's format has no weights for {listed(both)} in addition to adapters, and other code moves them."
        return (
            f"`export={directory!r}` cannot be written: {why if both else error} Leave `export` out, or let that code "
            "skip what does not train (`if parameter.requires_grad`)."
        )
    if to_know is not None and moving:
        rank_zero_info(f"`export={directory!r}`: {to_know}")
    return None


def export(trainer: Any, module: nn.Module, directory: str, best: Mapping[str, Any] | None) -> None:
    """Write the adapters of ``module`` as a PEFT directory that records the run; every rank must call it.

    An error becomes a warning: at the end of a run the merge must not depend on it.

    Args:
        trainer: the Trainer.
        module: its module.
        directory: where.
        best: the checkpoint that the adapters come from, or ``None`` for the last.
    """
    try:
        facts = _facts(trainer) if best is None else _facts_of_best(trainer, best)
        save_adapter(module, directory, metadata=facts)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # the last where a disk is full
        rank_zero_warn(f"`export={directory!r}` was not written: {error} Use save_adapter(module, ...).")


def _facts(trainer: Any) -> dict[str, str]:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step), "metrics": json.dumps(metrics)}


def _facts_of_best(trainer: Any, best: Mapping[str, Any]) -> dict[str, str]:
    callback = best_checkpoints(trainer)
    score = getattr(callback, "best_model_score", None)
    metrics = {} if callback is None or score is None else {callback.monitor: float(score)}
    epoch, step = best.get("epoch", 0), best.get("global_step", 0)
    return {"epoch": str(epoch), "step": str(step), "metrics": json.dumps(metrics)}
