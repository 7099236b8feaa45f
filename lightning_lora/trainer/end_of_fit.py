"""The end of ``fit``: which adapters are exported and merged, and what is reported."""

from __future__ import annotations

from typing import Any

from lightning_lora.trainer.checkpoint_io import export_merged, load_best
from lightning_lora.trainer.compatibility import is_spawned
from lightning_lora.trainer.imports import rank_zero_info, rank_zero_warn
from lightning_lora.trainer.init_and_export import export
from lightning_lora.trainer.kept_copies import merge_copies
from lightning_lora.trainer.run import Run

LOST = 0.01  # share of the update that rounding may take before it is reported


def finish(run: Run) -> None:
    """Export and merge what ``run_config`` asks for, after the strategy was torn down; every rank must call it."""
    if is_spawned(run.trainer):
        run.method.remove(run.module)
        rank_zero_info(
            "Processes started by spawn or fork do not give adapters back, so nothing is merged: the module in the "
            "starting process stays the base, and the trained adapters are in the checkpoints. Use them with "
            "ckpt_path='best'."
        )
        return
    merge, export_to = run.run_config.merge, run.run_config.export
    is_dry = run.trainer.fast_dev_run
    best: dict[str, Any] | None = None
    if merge == "best" and not is_dry:
        best = load_best(run.trainer, run.module, run.method, run.files.weights_only)
        if best is None:
            rank_zero_warn("`merge='best'` found no best checkpoint: nothing is merged or exported, the adapters stay.")
            return
    if export_to is not None and not is_dry:
        export(run.trainer, run.module, export_to, best)
    if merge:
        merge_into_base(run)


def merge_into_base(run: Run) -> None:
    """Merge in place; where the weights are in pieces, write the merged weights into a file instead."""
    why_never = run.method.never_merges(run.module)
    if why_never is not None:
        rank_zero_info(why_never)
        return
    why_not_here = run.method.cannot_write(run.module)
    if why_not_here is not None:
        path = export_merged(run.trainer, run.method, run.files.base_fingerprint())
        rank_zero_info(
            f"{why_not_here} The merged weights are in {path}, for `safetensors.torch.load_file`, and the module keeps "
            "its adapters."
        )
        return
    lost = run.method.merge(run.module)
    merge_copies(run.trainer, run.module, run.method)
    run.strategy_adapter.after_merge()
    worst = max(lost, key=lost.__getitem__, default="")
    if lost.get(worst, 0) > LOST:
        rank_zero_info(
            f"Merged {len(lost)} layers. Rounding to the weights' dtype lost up to {lost[worst]:.1%} of the update "
            f"(in `{worst}`); for the exact sum merge into an fp32 model."
        )
