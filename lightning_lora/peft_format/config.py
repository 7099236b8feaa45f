"""PEFT's ``adapter_config.json``: every value checked, methods other than plain LoRA refused by name.

Its rules are read from peft 0.21 (``tuners/lora/config.py``, ``tuners/lora/model.py``), which is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.config import BIASES, scale_of
from lightning_lora.files.json_files import shown
from lightning_lora.names import Value
from lightning_lora.patterns.expression import expression

ALL_LINEAR = "all-linear"
MOST_KEYS = 50_000  # of a pattern; one for each layer of the largest mixtures of experts


@dataclass(frozen=True)
class PeftConfig:
    """The checked values of an ``adapter_config.json``; names are relative to the model that peft wraps.

    Args:
        r: rank where no key of ``rank_pattern`` matches.
        alpha: numerator of the scale where no key of ``alpha_pattern`` matches.
        targets: names and their tails, or a regular expression, or ``"all-linear"``.
        exclude: names and their tails, or a regular expression.
        layers: numbers of the layers to adapt; ``None`` for all.
        layers_pattern: the names that such a number follows.
        rank_pattern: ranks by regular expression.
        alpha_pattern: alphas by regular expression.
        rslora: whether the scale is ``alpha / sqrt(r)``.
        modules_to_save: the ends of the names of modules that are trained in full.
        bias: which biases train.
        dropout: probability of dropping an input of A.
        gaussian: whether A starts as a normal.
        classifies: whether the task has a classification head.
        transposed: whether the linear layers keep their weight as ``(in_features, out_features)``.
        base: name of the base as ``from_pretrained`` takes it.
    """

    r: int
    alpha: float
    targets: list[str] | str
    exclude: list[str] | str | None
    layers: list[int] | None
    layers_pattern: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    modules_to_save: list[str]
    bias: str
    dropout: float
    gaussian: bool
    classifies: bool
    transposed: bool
    base: str | None

    def rank_for(self, name: str) -> int:
        """Rank of the adapter of the module ``name``."""
        return first_key(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        """Alpha of the adapter of the module ``name``."""
        return first_key(self.alpha_pattern, name, self.alpha)

    def scale_for(self, name: str) -> float:
        """Factor in front of ``B A`` for the module ``name``."""
        return scale_of(self.alpha_for(name), self.rank_for(name), self.rslora)


def first_key(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first regular expression that ``name`` or a tail of it matches, as in peft."""
    matching = (value for key, value in patterns.items() if expression(rf"(.*\.)?({key})$").match(name))
    return next(matching, default)


INITS: tuple[object, ...] = (True, False, "gaussian", "eva", "orthogonal")  # these do not change the base
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these change it
# Keys of other methods, with what to do; and keys that do not change the outputs.
REFUSED = {
    "use_dora": "DoRA scales the merged weight: merge it with peft and load that model as the base",
    "lora_bias": "B has a bias there: merge it with peft and load that model as the base",
    "megatron_config": "it is for Megatron's parallel layers: convert them to plain layers",
    "trainable_token_indices": "it holds single rows of an embedding: merge it with peft first",
    "target_parameters": "it adapts parameters by name: merge it with peft first",
    "alora_invocation_tokens": "an activated LoRA acts on the tokens after an invocation only",
    "layer_replication": "it repeats layers of the base: build that base first and adapt it anew",
    "ensure_weight_tying": "it ties the adapters of two layers: merge it with peft first",
}
IGNORED = {"peft_type", "peft_version", "auto_mapping", "revision", "inference_mode"}
IGNORED |= {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
IGNORED |= {"runtime_config", "task_type", "base_model_name_or_path"}
READ = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"}
READ |= {"rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "lora_dropout", "init_lora_weights"}
READ |= {"fan_in_fan_out"}


def read_config(values: Mapping[str, Any]) -> PeftConfig:
    """Check the values of an ``adapter_config.json``.

    Raises:
        ValueError: naming the key that is missing, of the wrong type, or of another method than plain LoRA.
    """
    _check_method(values)
    asked = PeftConfig(
        r=_rank("r", values.get("r", 8)),
        alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
        targets=_targets(values.get("target_modules")),
        exclude=_names_or_expression("exclude_modules", values.get("exclude_modules")) or None,
        layers=_layers(values.get("layers_to_transform")),
        layers_pattern=_layers_pattern(values.get("layers_pattern")),
        rank_pattern=_pattern("rank_pattern", values.get("rank_pattern"), _rank),
        alpha_pattern=_pattern("alpha_pattern", values.get("alpha_pattern"), _alpha),
        rslora=_flag("use_rslora", values.get("use_rslora", False)),
        modules_to_save=_names("modules_to_save", values.get("modules_to_save")),
        bias=_bias(values.get("bias", "none")),
        dropout=_dropout(values.get("lora_dropout", 0.0)),
        gaussian=values.get("init_lora_weights") == "gaussian",
        classifies=values.get("task_type") == "SEQ_CLS",
        transposed=_flag("fan_in_fan_out", values.get("fan_in_fan_out", False)),
        base=_text("base_model_name_or_path", values.get("base_model_name_or_path")),
    )
    if isinstance(asked.targets, str) and asked.layers is not None:
        raise _wrong("layers_to_transform", "null where `target_modules` is no list", asked.layers)
    for name in asked.modules_to_save:
        _check_expression("modules_to_save", rf"(^|.*\.){name}($|\..*)")
    return asked


def difference(values: Mapping[str, Any], written: Mapping[str, Any]) -> str | None:
    """The first key with a meaning here that has two values, in words; ``None`` where there is none."""
    for key in sorted(READ):
        value, before = (side.get(key) or None for side in (values, written))
        if value != before:
            return f"`{key}` is {shown(value)} and was {shown(before)}"
    return None


def _check_method(values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise _wrong("peft_type", "'LORA', the one method that this reads", values.get("peft_type"))
    for key, reason in REFUSED.items():
        if values.get(key) not in (None, False, [], {}):
            raise ValueError(f"`adapter_config.json` has `{key}`, which is not plain LoRA: {reason}.")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(OTHER_BASE):
        raise ValueError(
            f"`adapter_config.json` has `init_lora_weights` {shown(init)}, which changed the base's weights before "
            "training, so these A and B belong to another base. Save it again with peft's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    if not isinstance(init, (bool, str)) or init not in INITS:
        raise _wrong("init_lora_weights", f"one of {', '.join(map(repr, INITS))}", init)
    known = {*IGNORED, *REFUSED, *READ}
    for key, value in values.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise ValueError(
                f"`adapter_config.json` has {shown(key)}: {shown(value)}, which may mean another method than plain "
                "LoRA. If it does not change what the adapter computes, take it out of the file."
            )


def _wrong(key: str, expected: str, value: object) -> ValueError:
    return ValueError(f"`{key}` in `adapter_config.json` must be {expected}, but got {shown(value)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rank(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, "a positive integer", value)
    return value


def _alpha(key: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value < 1e30:
        raise _wrong(key, "a positive number", value)
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _text(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong(key, "a string or null", value)
    return value


def _bias(value: Any) -> str:
    if not isinstance(value, str) or value not in BIASES:
        raise _wrong("bias", f"one of {', '.join(map(repr, BIASES))}", value)
    return value


def _dropout(value: Any) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise _wrong("lora_dropout", "a probability in [0, 1)", value)
    return float(value)


def _names(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _wrong(key, "a list of module names", value)
    return value


def _names_or_expression(key: str, value: Any) -> list[str] | str:
    if isinstance(value, str):
        _check_expression(key, value)
        return value
    return _names(key, value)


def _targets(value: Any) -> list[str] | str:
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    targets = _names_or_expression("target_modules", value)
    if not targets:
        raise _wrong("target_modules", "module names or a regular expression", value)
    return targets


def _layers(value: Any) -> list[int] | None:
    numbers = [value] if isinstance(value, int) else value
    if numbers is not None and not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        raise _wrong("layers_to_transform", "layer numbers", value)
    return numbers or None


def _layers_pattern(value: Any) -> list[str]:
    patterns = _names("layers_pattern", [value] if isinstance(value, str) and value else value or None)
    for pattern in patterns:
        if not re.fullmatch(r"(?:\w|\\?\.)+", pattern):
            raise _wrong("layers_pattern", "the name of a list of layers, as `layers`", pattern)
    return patterns


def _pattern(key: str, value: Any, checked: Callable[[str, Any], Value]) -> dict[str, Value]:
    values = {} if value is None else value
    if not isinstance(values, dict) or len(values) > MOST_KEYS:
        raise _wrong(key, f"an object of numbers by module name, at most {MOST_KEYS:,}", value)
    for pattern in values:
        _check_expression(key, rf"(.*\.)?({pattern})$")
    return {name: checked(f"{key}[{name[:200]!r}]", number) for name, number in values.items()}


def _check_expression(key: str, pattern: str) -> None:
    try:
        expression(pattern)
    except ValueError as error:
        raise _wrong(key, f"a regular expression ({error})", pattern) from error
