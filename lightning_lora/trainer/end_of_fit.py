"""The end of ``fit``: which adapters are exported and merged, and what is reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_lora.model.quantized.merge import MergeBase, merge_base_of
from lightning_lora.names import counted
from lightning_lora.trainer.checkpointing.best import load_best
from lightning_lora.trainer.checkpointing.init_and_export import export
from lightning_lora.trainer.checkpointing.merged_file import export_merged, write_merged_file
from lightning_lora.trainer.compatibility import best_checkpoints, gpu_of, is_spawned
from lightning_lora.trainer.imports import rank_zero_info, rank_zero_warn
from lightning_lora.trainer.kept_copies import merge_copies
from lightning_lora.trainer.run import Run

LOST = 0.01  # share of the update that rounding may take before it is reported
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def finish(run: Run) -> None:
    """Export and merge what ``run_config`` asks for, after the strategy was torn down; every rank must call it."""
    if is_spawned(run.trainer) and not run.method.is_plain(run.module):
        run.method.remove(run.module)
        rank_zero_info(
            "Processes started by spawn or fork do not give adapters back, so nothing is merged: the module in the "
            "starting process stays the base, and the trained adapters are in the checkpoints. Use them with "
            "ckpt_path='best'."
        )
        return
    config, is_dry = run.run_config, run.trainer.fast_dev_run
    best, which = None, f"the adapters of the last step ({run.trainer.global_step})"
    if config.merge == "best" and not is_dry:
        try:
            best = _load_best(run)
        except FileNotFoundError as error:
            rank_zero_warn(
                f"`merge='best'` {error}: nothing is merged, exported or written. The module keeps its adapters, which "
                "are those of the last step."
            )
            return
        which = f"the adapters of the best checkpoint, {_best_path(run)}"
    if isinstance(config.merge, Mapping):
        which += f", with the factors {config.merge}"
    if config.export is not None and not is_dry and run.first_steps.can_export():
        export(run.trainer, run.module, config.export, best)
    done = (
        merge_into_base(run, which)
        if config.merge
        else "Nothing is merged (merge=False), the module keeps its adapters."
    )
    if config.merged is not None and not is_dry and run.method.cannot_write(run.module) is None:
        write_merged_file(run.trainer, run.method, run.files.base_fingerprint(), config.merged)
    rank_zero_info(" ".join([done, *_places(run)]))


def _best_path(run: Run) -> str:
    return str(getattr(best_checkpoints(run.trainer), "best_model_path", ""))


def _load_best(run: Run) -> dict[str, Any]:
    """Load the adapters of the best checkpoint.

    Raises:
        FileNotFoundError: if there is none, or no file where it was; the end of a sentence.
    """
    path = _best_path(run)
    if path and Path(path).is_dir():
        raise FileNotFoundError(f"found a directory at {path}, the path of the best checkpoint")
    try:
        best = load_best(run.trainer, run.module, run.method, run.files.weights_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"found no file at {path}, the path of the best checkpoint; was it moved?") from error
    if best is None:
        raise FileNotFoundError("found no best checkpoint")
    return best


def merge_into_base(run: Run, which: str) -> str:
    """Merge in place; where the weights are in pieces, write the merged weights into a file instead.

    Args:
        run: the run.
        which: of its adapters are on the module now.

    Returns:
        What was done, in a sentence or two.
    """
    why_never = run.method.never_merges(run.module)
    if why_never is not None:
        return why_never
    why_not_here = run.method.cannot_write(run.module)
    if why_not_here is not None:
        return _merge_into_file(run, why_not_here, which)
    dtypes = {weight.dtype for _, weight in run.method.adapted_weights(run.module).values()}
    try:
        lost = run.method.merge(run.module, gpu_of(run.trainer))
    except (ValueError, OSError) as error:
        if run.run_config.merge_base is None:
            raise
        rank_zero_warn(f"`merge_base={run.run_config.merge_base!r}`: {error}")
        return "Nothing is merged: the module keeps its adapters, and the checkpoints hold them."
    into = merge_base_of(run.module)
    dtypes = dtypes if into is None or into.dtype is None else {into.dtype}
    merge_copies(run.trainer, run.module, run.method)
    run.strategy_adapter.after_merge()
    count = counted(len(lost), "layer")
    done = (
        f"Merged {count} in {', '.join(sorted(map(_short, dtypes)))}{_into_what(into)}: {which}."
        if lost
        else f"Merged already: {which}."
    )
    worst = max(lost, key=lost.__getitem__, default="")
    if lost.get(worst, 0) > LOST:
        done += (
            f" Rounding to the weights' dtype lost up to {lost[worst]:.1%} of the update (in `{worst}`); for the exact "
            "sum merge into an fp32 model."
        )
    return done


def _into_what(into: MergeBase | None) -> str:
    if into is None:
        return ""
    return " into the dequantized base" if into.path is None else f" into the weights in {into.path}"


def _merge_into_file(run: Run, why_not_here: str, which: str) -> str:
    path, base = run.run_config.merged, run.files.base_fingerprint()
    if path is None or run.trainer.fast_dev_run:
        path = str(export_merged(run.trainer, run.method, base))
    elif not write_merged_file(run.trainer, run.method, base, path):
        return f"{why_not_here} The module keeps its adapters."
    return (
        f"{why_not_here} The merged weights, with {which}, are in {path}, for `safetensors.torch.load_file`, and the "
        "module keeps its adapters."
    )


def _short(dtype: torch.dtype) -> str:
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _places(run: Run) -> list[str]:
    """Where the files of the run are, each kind in a sentence."""
    saving = [
        each
        for each in run.trainer.checkpoint_callbacks
        if getattr(each, "best_model_path", "") or getattr(each, "last_model_path", "")
    ]
    places = [f"Checkpoints: {folder}." for folder in dict.fromkeys(str(each.dirpath) for each in saving)]
    for kind, path in {"PEFT directory": run.run_config.export, "Merged weights": run.run_config.merged}.items():
        if path is not None and Path(path).exists():
            places.append(f"{kind}: {path}.")
    return places
