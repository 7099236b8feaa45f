"""Arguments as plain data, and the checks that configurations share.

A configuration is stored in checkpoints that load with ``torch.load(weights_only=True)``, in JSON and in YAML. So it
holds plain data from the moment it is made, whatever sequence, mapping, number or path came in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from lightning_lora.patterns.expression import expression


def plain_data(value: Any) -> Any:
    """``value`` as lists, dicts, strings, numbers, bools and None; what is none of these stays as it is.

    OmegaConf's lists and dicts are a ``Sequence`` and a ``Mapping``; NumPy's and torch's arrays and numbers have
    ``tolist``.

    Example:
        >>> from pathlib import PurePosixPath
        >>> plain_data({"targets": ("q", "v"), "export": PurePosixPath("runs/adapter")})
        {'targets': ['q', 'v'], 'export': 'runs/adapter'}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a sub-class: NumPy's, or an enum
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if hasattr(value, "tolist"):
        return plain_data(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain_data(inner) for inner in value]
    return value


# What arguments of peft's LoraConfig are called here.
PEFT_NAMES = {
    "target_modules": "targets=[...]",
    "target_parameters": "targets=[...], with the names of the parameters",
    "exclude_modules": "exclude=[...]",
    "layers_to_transform": "targets=[...], with an expression for the layers, such as 're:.*layers[.][0-3][.].*q_proj'",
    "layers_pattern": "targets=[...], with an expression for the layers, such as 're:.*layers[.][0-3][.].*q_proj'",
    "lora_alpha": "alpha=...",
    "lora_dropout": "dropout=...",
    "lora_bias": "bias=...",
    "use_rslora": "rslora=...",
    "init_lora_weights": "init='kaiming' or init='gaussian'",
    "modules_to_save": "also_train=[...]",
    "adapter_name": "name=...",
    "fan_in_fan_out": "nothing: the layer says which it is",
}


def check_argument_names(owner: str, names: Iterable[str], own: Iterable[str]) -> None:
    """Raise for arguments that peft has under another name.

    Args:
        owner: the class that is called.
        names: of the arguments that came.
        own: the names that the class takes.

    Raises:
        TypeError: naming what to write instead.
    """
    for name in set(PEFT_NAMES).intersection(names).difference(own):
        raise TypeError(f"{owner} takes no `{name}`, which is peft's name. Write {PEFT_NAMES[name]}.")


def check_rank(argument: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    _check_count(argument, value, "To train no adapter, leave LoRA out.")


def check_length(argument: str, value: Any, what: str) -> None:
    """Raise unless ``value`` is an integer of at least 1: the number of positions of ``what``, such as a prefix."""
    _check_count(argument, value, f"To add no {what}, leave the callback out.")


def _check_count(argument: str, value: Any, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be an integer, but got {value!r}.")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, but got {value}. {remedy}")


def check_positive(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a positive, finite number."""
    check_number(argument, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{argument}` must be positive and finite, but got {value}.")


def check_number(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a number, but got {value!r}.")


def check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``; 1 is not True."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_flag(argument: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a bool, but got {value!r}.")


def check_path(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a path as a string, or None."""
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"`{argument}` must be a path as a string, but got {value!r}.")


def check_patterns(argument: str, patterns: Any) -> None:
    """Raise unless ``patterns`` is a list of patterns of module names."""
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"`{argument}` must be a list of module names, but got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern or pattern == "re:":
            raise TypeError(f"`{argument}` must hold module names as non-empty strings, but got {pattern!r}.")
        if pattern.startswith("re:"):
            _check_expression(argument, pattern)


def _check_expression(argument: str, pattern: str) -> None:
    try:
        expression(pattern.removeprefix("re:"))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` has {pattern[:200]!r}, which cannot be used as a regular expression: {error}."
        ) from error


def check_mapping(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a dict whose keys are patterns of module names."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{argument}` must be a dict from module names to numbers, but got {value!r}.")
    check_patterns(argument, list(value))


def check_adapters(adapters: Any, name: str, own_arguments: tuple[str, ...]) -> None:
    """Raise unless ``adapters`` gives several adapters by name, each with arguments of its own.

    Args:
        adapters: the argument.
        name: the argument that names a single one.
        own_arguments: the arguments that may differ.
    """
    if not isinstance(adapters, Mapping) or not all(isinstance(own, Mapping) for own in adapters.values()):
        raise TypeError(
            "`adapters` must be a dict from names to dicts of arguments, such as {'fr': {}, 'de': {'r': 4}}, but got "
            f"{adapters!r}."
        )
    if not adapters:
        raise ValueError("`adapters` must name at least one adapter, but got {}.")
    if name != "default":
        raise ValueError(f"`name={name!r}` and `adapters` both name adapters. Leave `name` out.")
    for key, own in adapters.items():
        unknown = [argument for argument in own if argument not in own_arguments]
        if unknown:
            raise ValueError(
                f"`adapters[{key!r}]` must hold only {', '.join(own_arguments)}, but got {unknown[0]!r}: that is the "
                "same for all adapters."
            )
        if "lr_scale" in own:
            check_positive(f"adapters[{key!r}]['lr_scale']", own["lr_scale"])


def check_factors(argument: str, value: Any) -> None:
    """Raise unless ``value`` is a dict from names of adapters to finite numbers."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"`{argument}` must be a dict from names of adapters to numbers, but got {value!r}.")
    for name, factor in value.items():
        check_number(f"{argument}[{name!r}]", factor)
        if not math.isfinite(factor):
            raise ValueError(f"`{argument}[{name!r}]` must be finite, but got {factor}.")


def strengths_of(keep: Any) -> Any:
    """The argument ``keep`` as a dict: adapters in a list rest.

    Example:
        >>> strengths_of(["fr", "de"])
        {'fr': 0.0, 'de': 0.0}
    """
    names = plain_data(keep)
    return dict.fromkeys(names, 0.0) if isinstance(names, list) else names


def check_route(route: Any, balance: Any) -> None:
    """Raise unless ``route`` can name an entry of a batch, and ``balance`` has one to count by."""
    if route is not None and (not isinstance(route, (str, int)) or isinstance(route, bool) or route == ""):
        raise TypeError(
            f"`route` must be a key of the batch, its index in a sequence, or 'dataloader', but got {route!r}."
        )
    check_flag("balance", balance)
    if balance and route is None:
        raise ValueError(
            "`balance=True` divides each adapter's gradient by its share of the samples, and without `route` no sample "
            "belongs to one adapter. Give `route`, or leave `balance` out."
        )


def check_merge(merge: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``merge`` is one of ``choices``, or gives the factors of updates by adapter."""
    if isinstance(merge, Mapping):
        check_factors("merge", merge)
    else:
        check_choice("merge", merge, choices)


def check_targets(targets: Any, presets: tuple[str, ...]) -> None:
    """Raise unless ``targets`` is one of ``presets``, or a list of patterns that is not empty."""
    if not isinstance(targets, str):
        check_patterns("targets", targets)
        if not targets:
            raise ValueError(f"`targets` must name at least one module, but got {targets!r}.")
    elif targets not in presets:
        raise ValueError(
            f"`targets` must be one of the presets {', '.join(map(repr, presets))} or a list of module names, but got "
            f"{targets!r}. To adapt modules of that name write targets=[{targets!r}]."
        )


def check_merge_base(argument: str, base: Any, dequantize: Any, merges: bool = True) -> None:
    """Raise unless ``base``, the value of ``argument``, is a path or None, and None where ``dequantize`` is set.

    Args:
        argument: the name of the argument.
        base: its value.
        dequantize: the other way to say what adapters on a quantized base are merged into.
        merges: whether anything is merged, so that the two arguments mean something.
    """
    check_flag("dequantize", dequantize)
    if base is not None and not isinstance(base, (str, os.PathLike)):
        raise TypeError(f"`{argument}` must be the path of a model in full precision, but got {base!r}.")
    if base is not None and dequantize:
        raise ValueError(
            f"`{argument}={str(base)!r}` and `dequantize=True` name two bases to merge into: the file's weights, and "
            "the dequantized ones. Give one of the two."
        )
    if (base is not None or dequantize) and not merges:
        raise ValueError(
            f"`{argument}` and `dequantize` say what adapters on a quantized base are merged into, and merge=False "
            "without `merged` merges nothing. Leave them out, or ask for a merge."
        )


def check_base_dtype(base_dtype: str | None, compute: str, save: str) -> None:
    """Raise if ``compute`` or ``save`` needs the weights that ``base_dtype`` takes off the module."""
    if compute == "weights" and base_dtype is not None:
        raise ValueError(
            f"`compute='weights'` adds B A to weights that `base_dtype={base_dtype!r}` has rounded, which "
            "gives other results than without it. Leave one of the two out."
        )
    if save == "merged" and base_dtype is not None:
        raise ValueError(
            f"`save='merged'` writes sums with the full-precision weights, which `base_dtype={base_dtype!r}` "
            "takes off the module during the run. Leave one of the two out."
        )
