"""What a checkpoint of a run holds: adapters without the base, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import RunConfig
from lightning_lora.files.atomic import atomic_write
from lightning_lora.methods.base import Method
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.model.initial_values import moved
from lightning_lora.model.state import keep_adapter, real_keys
from lightning_lora.trainer.checkpointing.kept_states import own_names, without_base_values

KEY = "lightning_lora"
KEPT = "kept"  # under our key: the adapters that did not train
FORMATS = (1, 2)
ENTRIES_OF_RUN = ("state_dict", "optimizer_states", "lr_schedulers")  # under our key in a file of save="merged"
OPTIMIZER_NAMES = "optimizer_names"  # the names of the parameters in each group of each optimizer
WEIGHTS = ("state_dict", "current_model_state")  # the second is WeightAveraging's


def facts(
    method: Method, run_config: RunConfig, base: Fingerprint, kinds: dict[str, str], kept: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint records of its adapter, as plain data.

    Format 1, written until version 0.1.0, holds the arguments of the run in ``config`` as well.

    Args:
        method: of the adapter.
        run_config: of the run.
        base: the fingerprint of the frozen weights.
        kinds: of the adapted layers, in PEFT's format.
        kept: of the adapters that do not train, as of :func:`kept_adapters`.
    """
    config = method.config.to_dict()
    about = {"format": FORMATS[-1], "method": method.key, "config": config, "run": run_config.to_dict()}
    return {**about, "base": base, "kinds": kinds, **({KEPT: kept} if kept else {})}


def without_base(
    checkpoint: dict[str, Any], method: Method, model: nn.Module, seen_by_hooks: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``checkpoint`` without the base: averaging callbacks put whole models there, as an entry and in their state.

    Args:
        checkpoint: stays as it is.
        method: of the adapter.
        model: the module.
        seen_by_hooks: the state dict that hooks got, to know the base's tensors where a hook renamed them.
    """
    frozen, base = method.frozen_names(model), method.base_names(model)
    places = _without({key: value for key, value in checkpoint.items() if key in WEIGHTS}, frozen, base)
    renamed = tensor_ids(value for key, value in (seen_by_hooks or {}).items() if names.clean(key) in base)
    for weights in WEIGHTS:  # also where a hook took some of the base out
        if isinstance(state := places.get(weights), dict):
            kept = keep_adapter(state, base)
            places[weights] = {key: value for key, value in kept.items() if id(value) not in renamed}
    if "callbacks" in checkpoint:
        places["callbacks"] = without_base_values(checkpoint["callbacks"], model, frozen, base)
    return {**checkpoint, **places}


def tensor_ids(values: Iterable[Any]) -> set[int]:
    """The ids of the tensors in ``values``."""
    return {id(value) for value in values if isinstance(value, Tensor)}


def _without(mapping: dict[Any, Any], frozen: set[str], base: set[str]) -> dict[Any, Any]:
    """``mapping`` without base entries; ``mapping`` itself if it holds no state of a whole model."""
    own_name = own_names(mapping, frozen)
    inner = {key: _without(value, frozen, base) for key, value in mapping.items() if isinstance(value, dict)}
    dropped = {key for key, name in own_name.items() if name in base}
    if not dropped and all(value is mapping[key] for key, value in inner.items()):
        return mapping
    return {key: inner.get(key, value) for key, value in mapping.items() if key not in dropped}


def write_checkpoint(checkpoint: dict[str, Any], path: Any) -> None:
    """Write a new file and rename it to ``path``: a kill during the write leaves the old one.

    Lightning's own write goes through memory and the system's temporary folder, from where another disk is a copy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.save writes the name of the file into it, so it gets an open one: equal runs give equal bytes.
    with atomic_write(path) as part, part.open("wb") as file:
        torch.save(checkpoint, file)


def fit_to(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename the weights in the file to the keys of ``model``, and add first values of buffers that had not moved."""
    real = real_keys(model)
    owners = {id(module): name for name, module in names.named_modules(model)}
    still = {names.join(owners[id(m)], key): value for m, key, value in moved(model) if key in m._buffers}
    for weights in WEIGHTS:
        if weights in checkpoint:
            state = {**still, **checkpoint[weights]}
            checkpoint[weights] = {real.get(key, key): value for key, value in state.items()}
    return checkpoint


def check_complete(
    checkpoint: dict[str, Any], method: Method, model: nn.Module, seen_by_hooks: Mapping[str, Any] | None = None
) -> None:
    """Raise if the file about to be written, as of :func:`without_base`, lacks adapters: nobody could load it.

    Raises:
        ValueError: naming the hook that can have removed them.
    """
    state = checkpoint.get("state_dict", {})
    written = tensor_ids(state.values())
    seen = {names.clean(key): value for key, value in (seen_by_hooks or {}).items()}
    for key in method.needed_names(model):
        if key not in state and id(seen.get(key)) not in written:  # a hook may rename what it can name again
            raise ValueError(
                f"The checkpoint to be written lacks `{key}`: an `on_save_checkpoint` of {type(model).__name__} or of "
                "a callback removed it, or copied it under another name. Leave the tensors of adapters in the state "
                "dict."
            )
