"""Checkpoints of a run: adapters alone when they are written, checked before anything is loaded when they are read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.apply import difference
from lightning_lora.config import LoRAConfig
from lightning_lora.fingerprint import Fingerprint, exactly_same, other_base
from lightning_lora.freeze import trained_parameters
from lightning_lora.originals import moved
from lightning_lora.state import base_names, check_state, keep_adapter

KEY = "lightning_lora"
WEIGHTS = ("state_dict", "current_model_state")  # the second is WeightAveraging's


def facts(config: LoRAConfig, base: Fingerprint) -> dict[str, Any]:
    """What a checkpoint says of its adapter, as plain data."""
    return {"format": 1, "config": config.to_dict(), "base": base}


def without_base(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``checkpoint`` without a tensor of the base, however deep: averaging callbacks keep whole models in theirs."""
    return dict(_without(checkpoint, base_names(model)))


def _without(mapping: dict[Any, Any], base: set[str]) -> dict[Any, Any]:
    """``mapping`` itself where nothing in it is of the base: its class may matter to the user."""
    inner = {key: _without(value, base) for key, value in mapping.items() if isinstance(value, dict)}
    dropped = {key for key, value in mapping.items() if isinstance(value, Tensor) and is_among(str(key), base)}
    if not dropped and all(value is mapping[key] for key, value in inner.items()):
        return mapping
    return {key: inner.get(key, value) for key, value in mapping.items() if key not in dropped}


def is_among(key: str, base: set[str]) -> bool:
    """Whether a key of a state dict of the module, or of an ``AveragedModel`` or DDP around it, is one of ``base``."""
    name = names.clean(key)
    return name in base or name.removeprefix("module.") in base


class AdapterOnly:
    """A ``load_state_dict`` post-hook: a file without any frozen parameter is an adapter's, and lacks none of them.

    One that has some of them and lacks others stays as wrong as it was.
    """

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        """Drop the base's names from the missing keys."""
        trained = {id(parameter) for _, parameter in trained_parameters(module)}
        every = module.named_parameters(remove_duplicate=False)
        frozen = {names.clean(name) for name, parameter in every if id(parameter) not in trained}
        missing = incompatible.missing_keys
        if len(missing) == len(module.state_dict()):
            return
        if len(frozen) == sum(is_among(key, frozen) for key in missing):
            base = base_names(module)
            missing[:] = [key for key in missing if not is_among(key, base)]


def write(save: Callable[..., None], checkpoint: dict[str, Any], path: Any, storage_options: Any, atomic: bool) -> None:
    """Save beside the file and put it in its place: a kill in mid-write leaves the old one.

    Lightning's own write goes through the system's temporary folder, from where another disk is a copy.
    """
    if not atomic or "://" in str(path):
        save(checkpoint, path, storage_options=storage_options)
        return
    part = f"{path}.{os.getpid()}.part"
    save(checkpoint, part, storage_options=storage_options)
    if Path(part).exists():  # rank zero alone writes
        Path(part).replace(path)


def read(load: Callable[..., Any], path: Any, weights_only: bool | None) -> dict[str, Any]:
    """Load a file that a LoRA run wrote.

    Raises:
        ValueError: if it cannot be read, or holds no adapter.
    """
    try:
        checkpoint = load(path, weights_only=weights_only)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"`ckpt_path={str(path)!r}` cannot be read; is the file truncated? {error}") from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise ValueError(
            f"`ckpt_path={str(path)!r}` is a full checkpoint, without adapters. LoRACallback loads adapters only; "
            "to start from these weights load them into the module as its base: "
            "model.load_state_dict(torch.load(path)['state_dict'])."
        )
    return checkpoint


def check(checkpoint: dict[str, Any], path: Any, model: nn.Module, config: LoRAConfig, base: Fingerprint) -> None:
    """Raise unless the file's adapter is one of this configuration, on this base.

    Raises:
        ValueError: naming the first difference.
    """
    written, trained_on = facts_in(checkpoint, path)
    other = difference(config, written)
    if other is not None:
        raise ValueError(f"`ckpt_path={str(path)!r}` was written with {other}: give LoRACallback the same arguments.")
    wrong = other_base(trained_on, base)
    if wrong is not None:
        raise ValueError(
            f"`ckpt_path={str(path)!r}` was trained on another base: {wrong}. Load the base it was trained on first."
        )
    check_state(model, checkpoint["state_dict"])
    if not exactly_same(trained_on, base):
        rank_zero_warn(f"The base differs in low bits from the one that {path} was trained on (another dtype?).")
    if written.lr_scale != config.lr_scale:
        rank_zero_warn(f"{path} was written with lr_scale={written.lr_scale}; its learning rates are continued.")


def facts_in(checkpoint: dict[str, Any], path: Any) -> tuple[LoRAConfig, Fingerprint]:
    """The configuration and the base that the file says its adapter has.

    Raises:
        ValueError: if it does not say, or in words of a later version.
    """
    try:
        written, base = LoRAConfig(**checkpoint[KEY]["config"]), checkpoint[KEY]["base"]
        if not isinstance(checkpoint["state_dict"], dict) or not isinstance(base, dict):
            raise TypeError("no weights or no base")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`ckpt_path={str(path)!r}` does not say what adapter it holds ({error}): it is damaged, or was written by "
            "a later version of lightning_lora."
        ) from error
    return written, base


def fit_to(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Give the weights in the file the keys of ``model``, and buffers that had not moved then their first values."""
    real = {names.clean(key): key for key in model.state_dict()}
    owners = {id(module): name for name, module in names.named_modules(model)}
    still = {names.join(owners[id(m)], key): value for m, key, value in moved(model) if key in m._buffers}
    for weights in WEIGHTS:
        if weights in checkpoint:
            state = {**still, **checkpoint[weights]}
            checkpoint[weights] = {real.get(key, key): value for key, value in state.items()}
    return checkpoint


def adapter_of(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The adapter in a file that :func:`read` gave."""
    return keep_adapter(model, checkpoint["state_dict"])
