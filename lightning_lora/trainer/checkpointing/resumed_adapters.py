"""A file of other adapters than a run has: what is said of it, and where it cannot be continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.config import RunConfig
from lightning_lora.methods.base import Method
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.record import configs_of
from lightning_lora.trainer.checkpointing import reading
from lightning_lora.trainer.checkpointing.adapters_by_name import adapters_in, check_kept
from lightning_lora.trainer.imports import rank_zero_info


def compare_runs(
    checkpoint: dict[str, Any], path: Any, method: Method, module: nn.Module, run_config: RunConfig, callback_key: str
) -> None:
    """Report another rate than that of the run, the adapters that the file lacks, and those that the run has not.

    Args:
        checkpoint: checked.
        path: of the file.
        method: what the module is adapted by.
        module: the module of the run.
        run_config: what the run does with it.
        callback_key: of the callback, which the file has under its own name.

    Raises:
        ValueError: if kept adapters of another configuration or strength acted while the file was trained: what was
            trained belongs to what they add.
    """
    check_kept(checkpoint, path, module)
    reading.warn_of_other_rate(checkpoint, path, run_config.lr_scale)
    if not isinstance(method, LoRAMethod):
        return
    then, now = _acting(reading.strengths_in(checkpoint)), _acting(method.keep)
    if then != now:
        raise ValueError(
            f"`ckpt_path={str(path)!r:.400}` was written while kept adapters acted with the strengths {then}, and in "
            f"this run they act with {now}. What was trained belongs to what they add: give `keep` the same strengths, "
            "and fit the module that load_from_checkpoint(cls, path) gives."
        )
    _rename_callback(checkpoint, callback_key)
    held, present = adapters_in(checkpoint), list(configs_of(module))
    parts = _said([name for name in present if name not in held], "not in the file, and starts fresh")
    parts += _said(sorted(held.difference(present)), "not in this run, and its values stay out")
    if parts:
        rank_zero_info(" ".join([f"Resumed from {path}:", *parts]))


def _rename_callback(checkpoint: dict[str, Any], callback_key: str) -> None:
    """Lightning would miss the callback of the file, whose key has the name of its adapter."""
    callbacks, kind = checkpoint.get("callbacks", {}), callback_key.partition("[")[0]
    names = {key: callback_key if key.partition("[")[0] == kind else key for key in callbacks}
    if "callbacks" in checkpoint:
        checkpoint["callbacks"] = {names[key]: state for key, state in callbacks.items()}


def _acting(strengths: Mapping[str, float]) -> dict[str, float]:
    return {name: strength for name, strength in strengths.items() if strength}


def _said(names: list[str], what: str) -> list[str]:
    return [f"adapter `{name}` is {what}." for name in names]
