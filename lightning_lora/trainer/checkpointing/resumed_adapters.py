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
    checkpoint: dict[str, Any], path: Any, method: Method, module: nn.Module, run_config: RunConfig
) -> None:
    """Report another rate than that of the run, the adapters that the file lacks, and those that the run has not.

    Args:
        checkpoint: checked.
        path: of the file.
        method: what the module is adapted by.
        module: the module of the run.
        run_config: what the run does with it.

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
            f"this run they act with {now}. What was trained belongs to what they add: give `keep` the same strengths."
        )
    held, present = adapters_in(checkpoint), list(configs_of(module))
    parts = _said([name for name in present if name not in held], "not in the file, and starts fresh")
    parts += _said(sorted(held.difference(present)), "not in this run, and its values stay out")
    if parts:
        rank_zero_info(" ".join([f"Resumed from {path}:", *parts]))


def _acting(strengths: Mapping[str, float]) -> dict[str, float]:
    return {name: strength for name, strength in strengths.items() if strength}


def _said(names: list[str], what: str) -> list[str]:
    return [f"adapter `{name}` is {what}." for name in names]
