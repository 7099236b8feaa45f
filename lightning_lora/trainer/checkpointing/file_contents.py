"""What else brings the base into a checkpoint: modules in hyperparameters, and in what callbacks and hooks keep."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.distributed.sharded import local_shard
from lightning_lora.ops.packed.quantized_tensors import stored_tensors
from lightning_lora.trainer.checkpointing.contents import KEY, WEIGHTS
from lightning_lora.trainer.imports import rank_zero_warn

EXAMINED_ELSEWHERE = {*WEIGHTS, KEY, "optimizer_states", "lr_schedulers", "loops"}


def warn_of_modules(checkpoint: Mapping[str, Any], module: nn.Module) -> bool:
    """Warn of the entries of ``checkpoint`` that hold a module or a frozen weight of ``module``; whether there are any.

    Args:
        checkpoint: as it will be written.
        module: of the run.
    """
    frozen = (each for each in module.parameters() if not each.requires_grad and not each.is_meta)
    base = {_memory(local_shard(parameter)) for parameter in frozen} - {0}
    places = [place for place, value in _places(checkpoint) if holds_modules(value, base)]
    if places:
        rank_zero_warn(
            f"Files of this run are not small: {', '.join(f'`{place}`' for place in places)} of the checkpoint "
            f"{'holds' if len(places) == 1 else 'hold'} modules or frozen weights. Leave these out: "
            "`save_hyperparameters(ignore=[...])`, and in the state of a callback keep no module."
        )
    return bool(places)


def _places(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in checkpoint.items():
        if key in EXAMINED_ELSEWHERE:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}[{inner!r}]", each) for inner, each in value.items())
        else:
            yield key, value


def holds_modules(value: Any, base: set[int]) -> bool:
    """Whether a pickle of ``value`` would hold a module with parameters, or memory of ``base``."""
    finder = _Finder(base)
    try:
        finder.dump(value)
    except Exception:  # what cannot be pickled is an error where the file is written
        return finder.has_found
    return finder.has_found


def _memory(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` starts; 0 if it has none."""
    return stored_tensors(tensor)[0].untyped_storage().data_ptr()


class _Finder(pickle.Pickler):
    """Goes through all that a pickle would hold, without the contents of modules, tensors and buffers."""

    def __init__(self, base: set[int]) -> None:
        super().__init__(io.BytesIO(), protocol=5, buffer_callback=lambda buffer: None)
        self.base, self.has_found = base, False

    def persistent_id(self, each: Any) -> str | None:
        """A name in the place of ``each``, whose contents are then skipped."""
        if isinstance(each, nn.Module):
            self.has_found = self.has_found or next(each.parameters(), None) is not None
            return "module"
        if isinstance(each, Tensor):
            self.has_found = self.has_found or (each.layout == torch.strided and _memory(each) in self.base)
            return "tensor"
        return None
