"""What a checkpoint of a run holds, and the checks before anything of one is loaded.

A file holds adapters alone. Nothing is ever loaded in part: a truncated file, a missing key and an extra key are
errors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.files.atomic import atomic_write
from lightning_lora.files.json_files import printable
from lightning_lora.files.pickles import ObjectRefusedError
from lightning_lora.files.torch_files import checked, read_torch_file
from lightning_lora.methods.base import Method
from lightning_lora.model.fingerprint import Fingerprint, exactly_same, other_base
from lightning_lora.model.initial_values import moved
from lightning_lora.model.state import keep_adapter, real_keys
from lightning_lora.trainer.checkpoint_contents import check_facts, check_pairs, check_weights
from lightning_lora.trainer.frozen_facts import LATE, how_it_was_set, names_in
from lightning_lora.trainer.kept_states import own_names, without_base_values

KEY = "lightning_lora"
FORMATS = (1, 2)
AS_TRUSTED = "`weights_only=False` where you give the path"
DIRECTORY = "a directory, made by save_adapter(load_from_checkpoint(cls, path, weights_only=False), directory)"
TRUSTED = {"init_from": f"`init_from` {DIRECTORY}", "CKPT": f"the command {DIRECTORY}"}
WEIGHTS = ("state_dict", "current_model_state")  # the second is WeightAveraging's


def facts(method: Method, run_config: RunConfig, base: Fingerprint, kinds: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint records of its adapter, as plain data.

    Format 1, written until version 0.1.0, holds the arguments of the run in ``config`` as well.

    Args:
        method: of the adapter.
        run_config: of the run.
        base: the fingerprint of the frozen weights.
        kinds: of the adapted layers, in PEFT's format.
    """
    config = method.config.to_dict()
    about = {"format": FORMATS[-1], "method": method.key, "config": config, "run": run_config.to_dict()}
    return {**about, "base": base, "kinds": kinds}


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
                f"{_named(path, argument)} holds the base and live adapters together: it was saved outside a run. "
                "Load it by `apply_lora(model, LoRAConfig(...))` and `model.load_state_dict(...)`; fit without a path."
            )
        raise ValueError(
            f"{_named(path, argument)} is a full checkpoint, without adapters. LoRACallback loads adapters only; "
            "to start from these weights load them into the module as its base: "
            "model.load_state_dict(torch.load(path)['state_dict'])."
        )
    recorded = checkpoint[KEY]
    if isinstance(recorded, dict) and "state_dict" in recorded:  # written with save="merged"
        checkpoint["state_dict"] = recorded.pop("state_dict")
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


def check_config(written: LoRAConfig, path: Any, method: Method, argument: str = "ckpt_path") -> None:
    """Raise unless the file's adapter has the configuration of ``method``.

    Raises:
        ValueError: naming the first difference.
    """
    difference = method.difference(written)
    if difference is not None:
        raise ValueError(
            f"{_named(path, argument)} was written with {difference}: give LoRACallback the same arguments."
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
    if not exactly_same(trained_on, base):
        _warn(f"The base differs in low bits from the one that {path} was trained on (another dtype?).")


def _warn(message: str) -> None:
    from lightning_lora.trainer.imports import rank_zero_warn  # imports Lightning, which the command line does without

    rank_zero_warn(message)


def facts_in(checkpoint: dict[str, Any], path: Any, argument: str = "ckpt_path") -> tuple[LoRAConfig, Fingerprint]:
    """The configuration of the file's adapter, and the fingerprint of its base.

    Raises:
        ValueError: if the file does not record them, or was written by a later version.
    """
    try:
        recorded, state = checkpoint[KEY], checkpoint["state_dict"]
        if recorded.get("format") not in FORMATS:
            raise ValueError(f"its format is {recorded.get('format')!r:.50}, and {FORMATS[-1]} is the newest known")
        if recorded.get("method", "lora") != "lora":
            raise ValueError(f"its method is {recorded['method']!r:.50}, and LoRACallback reads 'lora'")
        for weights in WEIGHTS:
            if weights in checkpoint:
                check_weights(checkpoint[weights])
        check_facts(recorded, state)
        written, base = LoRAConfig.from_file(recorded["config"]), recorded["base"]
        check_pairs(written, state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{_named(path, argument)} does not say what adapter it holds ({printable(str(error))}): it is damaged, "
            "or was written by a later version of lightning_lora."
        ) from error
    return written, base


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
