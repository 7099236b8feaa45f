"""Reading a checkpoint of a run: every part of it is checked before a module is touched."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from lightning_lora.config import LoRAConfig, MethodConfig
from lightning_lora.files.json_files import printable
from lightning_lora.files.pickles import ObjectRefusedError
from lightning_lora.files.torch_files import checked, read_torch_file
from lightning_lora.methods.base import Method
from lightning_lora.methods.known import config_from_file
from lightning_lora.model.fingerprint import Fingerprint, inexact, other_base
from lightning_lora.trainer.checkpointing.checks import check_facts, check_pairs, check_weights
from lightning_lora.trainer.checkpointing.contents import ENTRIES_OF_RUN, FORMATS, KEPT, KEY, WEIGHTS
from lightning_lora.trainer.watching.frozen_facts import LATE, how_it_was_set, names_in

AS_TRUSTED = "`weights_only=False` where you give the path"
DIRECTORY = "a directory, made by save_adapter(load_from_checkpoint(cls, path, weights_only=False), directory)"
TRUSTED = {"init_from": f"`init_from` {DIRECTORY}", "CKPT": f"the command {DIRECTORY}"}


def on_cpu(path: Any, weights_only: bool) -> Any:
    """What is in the file at ``path``, for :func:`open_file` where no Trainer loads it."""
    return read_torch_file(Path(path), weights_only)


def by_torch(load: Callable[..., Any]) -> Callable[..., Any]:
    """``load`` after a check of the file, for a Trainer that reads with ``torch.load``; an address is not checked."""

    def load_checked(path: Any, weights_only: bool) -> Any:
        if "://" in str(path) or not Path(path).exists():  # Lightning says what is missing
            return load(path, weights_only=weights_only)
        return checked(Path(path), weights_only, lambda: load(path, weights_only=weights_only))

    return load_checked


def open_file(load: Callable[..., Any], path: Any, weights_only: bool, argument: str = "ckpt_path") -> Any:
    """What is in the file at ``path``: every checkpoint that the package reads is opened here.

    Args:
        load: takes the path and ``weights_only``.
        path: a path or an address.
        weights_only: ``False`` allows objects of any class, whose making can run any code.
        argument: the name of the argument that the path was given as, for errors.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if the file is damaged, or holds objects that were not allowed.
    """
    try:
        return load(path, weights_only=weights_only)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if not weights_only and isinstance(error, (ImportError, AttributeError)):
            raise  # the file is sound, and a class in it cannot be imported
        raise ValueError(_why_unreadable(path, error, argument)) from error


def _named(path: Any, argument: str) -> str:
    """The argument and the path for a message; a path may come from a file."""
    return f"`{argument}={str(path)!r:.400}`"


def _why_unreadable(path: Any, error: Exception, argument: str) -> str:
    refused = _refused_object(error)
    if refused is None:
        return f"{_named(path, argument)} cannot be read; is the file truncated? {_reason(error)}"
    return (
        f"{_named(path, argument)} holds an object of {refused}, perhaps a hyperparameter, and was not opened: "
        f"making such an object can run any code. If you trust the file, give {TRUSTED.get(argument, AS_TRUSTED)}."
    )


def _refused_object(error: Exception) -> str | None:
    """The class or function for which a file was refused, by us or by torch; ``None`` if that is not the reason."""
    if isinstance(error, ObjectRefusedError):
        return printable(str(error))
    match = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    return printable(match[1]) if match is not None and isinstance(error, pickle.UnpicklingError) else None


def _reason(error: Exception) -> str:
    # torch surrounds its reason with the advice to load the file again with less care.
    text = str(error)
    return printable(text.partition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or text)


def read(load: Callable[..., Any], path: Any, weights_only: bool, argument: str = "ckpt_path") -> dict[str, Any]:
    """Open a file that a LoRA run wrote.

    A full checkpoint is refused: load it into the module as its base. So is a file that was saved outside a run and
    holds the base and live adapters together.

    Raises:
        ValueError: if it cannot be read, or holds no adapter.
    """
    checkpoint = open_file(load, path, weights_only, argument)
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
        if any(".lora." in str(key) for key in (state if isinstance(state, dict) else ())):
            raise ValueError(
                f"{_named(path, argument)} holds the base and live adapters together: it was saved outside a run, "
                "for example after `fit` had returned. Use a checkpoint that the run wrote. Or load this one: "
                "`apply_lora(model, LoRAConfig(...))` and `model.load_state_dict(...)`; then fit without a path, or "
                "call `save_adapter(model, DIR)`."
            )
        raise ValueError(
            f"{_named(path, argument)} is a full checkpoint, without adapters. A run with a callback of this package "
            "loads only what it trains; to start from these weights load them into the module as its base: "
            "model.load_state_dict(torch.load(path)['state_dict'])."
        )
    recorded = checkpoint[KEY]
    if isinstance(recorded, dict) and "state_dict" in recorded:  # written with save="merged"
        checkpoint |= {key: recorded.pop(key) for key in ENTRIES_OF_RUN if key in recorded}
    return checkpoint


def check(
    checkpoint: dict[str, Any], path: Any, method: Method, base: Fingerprint, except_for: Collection[str] = ()
) -> None:
    """Raise unless the file's adapter is of this method and configuration, on this base.

    Args:
        checkpoint: from :func:`read`.
        path: of the file.
        method: what the module is adapted by.
        base: the fingerprint of the module's base.
        except_for: parameters of the base to leave out.

    Raises:
        ValueError: naming the first difference.
    """
    written, trained_on = facts_in(checkpoint, path)
    check_config(written, path, method)
    expected, present = (
        {name: sums for name, sums in sums_of.items() if name not in except_for} for sums_of in (trained_on, base)
    )
    check_base(expected, present, path, late=names_in(checkpoint[KEY], LATE))


def check_late(checkpoint: dict[str, Any], path: Any, base: Fingerprint) -> None:
    """Raise unless what hooks set after ``setup`` is in ``base`` what it was when the file was written.

    Raises:
        ValueError: naming the first difference.
    """
    late, trained_on = names_in(checkpoint[KEY], LATE), checkpoint[KEY]["base"]
    expected, present = ({name: sums_of[name] for name in late if name in sums_of} for sums_of in (trained_on, base))
    check_base(expected, present, path, late=late)


def warn_of_other_rate(checkpoint: dict[str, Any], path: Any, lr_scale: float) -> None:
    """Warn where the file continues rates of another ``lr_scale``."""
    recorded = checkpoint[KEY]
    written = recorded.get("run", recorded["config"]).get("lr_scale", 1.0)
    if written != lr_scale:
        _warn(
            f"{path} was written with lr_scale={written}; its learning rates are continued, and lr_scale={lr_scale} "
            "has no effect."
        )


def check_config(written: MethodConfig, path: Any, method: Method, argument: str = "ckpt_path") -> None:
    """Raise unless the file's adapter has the configuration of ``method``.

    Raises:
        ValueError: naming the first difference.
    """
    if type(written) is not type(method.config):
        raise ValueError(
            f"{_named(path, argument)} is a file of another method: it was written with a {type(written).__name__}, "
            f"and this run has a {type(method.config).__name__}. Give the callback of that method, with the same "
            "arguments."
        )
    difference = method.difference(written)
    if difference is not None:
        raise ValueError(
            f"{_named(path, argument)} was written with {difference}: give the callback the same arguments."
        )


def check_base(
    trained_on: Fingerprint, base: Fingerprint, path: Any, argument: str = "ckpt_path", late: Collection[str] = ()
) -> None:
    """Raise unless the file's adapter was trained on ``base``; warn where only the dtype differs.

    Raises:
        ValueError: naming the first difference.
    """
    wrong = other_base(trained_on, base)
    if wrong is not None:
        raise ValueError(
            f"{_named(path, argument)} was trained on another base: {wrong}. Load the base it was trained on first."
            + how_it_was_set(wrong, late)
        )
    warning = inexact(trained_on, base, str(path))
    if warning is not None:
        _warn(warning)


def _warn(message: str) -> None:
    from lightning_lora.trainer.imports import rank_zero_warn  # imports Lightning, which the command line does without

    rank_zero_warn(message)


def lora_facts_in(checkpoint: dict[str, Any], path: Any, argument: str = "ckpt_path") -> tuple[LoRAConfig, Fingerprint]:
    """As :func:`facts_in`, of a file that must be LoRA's.

    Raises:
        ValueError: naming the method, where it is another one.
    """
    written, base = facts_in(checkpoint, path, argument)
    if not isinstance(written, LoRAConfig):
        raise ValueError(
            f"{_named(path, argument)} was written with a {type(written).__name__}, and this needs A and B of LoRA. "
            "Load it by load_from_checkpoint(cls, path)."
        )
    return written, base


def facts_in(checkpoint: dict[str, Any], path: Any, argument: str = "ckpt_path") -> tuple[MethodConfig, Fingerprint]:
    """The configuration that the file was written with, of whatever method, and the fingerprint of its base.

    Raises:
        ValueError: if the file does not record them, or was written by a later version.
    """
    try:
        recorded, state = checkpoint[KEY], checkpoint["state_dict"]
        if recorded.get("format") not in FORMATS:
            raise ValueError(f"its format is {recorded.get('format')!r:.50}, and {FORMATS[-1]} is the newest known")
        for weights in WEIGHTS:
            if weights in checkpoint:
                check_weights(checkpoint[weights])
        check_facts(recorded, state)
        written, base = config_from_file(recorded.get("method", "lora"), recorded["config"]), recorded["base"]
        if isinstance(written, LoRAConfig):
            check_pairs([config.name for config in (*written.each(), *kept_in(checkpoint).values())], state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{_named(path, argument)} does not say what adapter it holds ({printable(str(error))}): it is damaged, "
            "or was written by a later version of lightning_lora."
        ) from error
    return written, base


def kept_in(checkpoint: Mapping[str, Any]) -> dict[str, LoRAConfig]:
    """The configurations of the adapters in the file that its run did not train, by name.

    Raises:
        ValueError: if what the file records of them is damaged.
    """
    kept = checkpoint[KEY].get(KEPT, {})
    if not isinstance(kept, dict) or not all(isinstance(each, dict) and "config" in each for each in kept.values()):
        raise ValueError("the configurations of the adapters that it keeps are damaged")
    configs = {name: LoRAConfig.from_file(each["config"]) for name, each in kept.items()}
    if any(config.name != name or config.adapters is not None for name, config in configs.items()):
        raise ValueError("the names of the adapters that it keeps are damaged")
    return configs


def strengths_in(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """How strongly the adapters in the file that its run did not train acted, by name."""
    strengths = {name: each.get("strength", 1.0) for name, each in checkpoint[KEY].get(KEPT, {}).items()}
    return {name: value for name, value in strengths.items() if isinstance(value, (int, float)) and isfinite(value)}
