"""The best checkpoint of a run, loaded at its end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_lora.foreign import SHARDING_STRATEGIES, is_a
from lightning_lora.methods.base import Method
from lightning_lora.model.written import written_parameters
from lightning_lora.trainer.checkpointing import contents, reading
from lightning_lora.trainer.checkpointing.checkpoint_io import checked, is_written_here
from lightning_lora.trainer.checkpointing.hook_state import fill_in, trained_entries
from lightning_lora.trainer.compatibility import best_checkpoints
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.replaced_layers import run_hook
from lightning_lora.trainer.watching.frozen_facts import WRITTEN, names_in
from lightning_lora.trainer.watching.frozen_watch import in_full


def load_best(trainer: Any, module: Any, method: Method, weights_only: bool | None) -> dict[str, Any] | None:
    """Load the adapters of the best checkpoint, with all that its file holds; the checkpoint, or ``None``.

    Lightning takes the path from the file that a run resumed from, which may come from a stranger. So only a file that
    this process wrote is opened with all that it holds; any other as the user said for this run, else as plain data.
    """
    path = getattr(best_checkpoints(trainer), "best_model_path", "")
    if not path:
        return None
    load = partial(trainer.strategy.checkpoint_io.load_checkpoint, map_location=torch.device("cpu"))
    trusted = is_written_here(path) or weights_only is False
    checkpoint = reading.read(checked(trainer.strategy, load), path, not trusted, "best_model_path")
    gone = {name for name, _ in written_parameters(module)} - {*names_in(checkpoint[contents.KEY], WRITTEN)}
    if gone:
        rank_zero_warn(
            f"The best checkpoint {path} was written before {in_full(sorted(gone))} moved, and does not hold it. What "
            "it was then is not known any more."
        )
        return None
    filled_in = {} if is_a(trainer.strategy, *SHARDING_STRATEGIES) else fill_in(checkpoint, module)
    run_hook(module, "on_load_checkpoint", method, checkpoint)  # undoes what its `on_save_checkpoint` did
    method.load(module, trained_entries(checkpoint, filled_in, method, module))
    return checkpoint
