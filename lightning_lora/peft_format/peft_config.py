"""PEFT's ``adapter_config.json``: what it asks for, and the smallest one that says what an adapter is.

Its rules are read from peft 0.21 (``tuners/lora/config.py``, ``tuners/lora/model.py``), which is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_lora.config import LoRAConfig
from lightning_lora.patterns import Value

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class PeftConfig:
    """What an ``adapter_config.json`` asks for, checked; names are relative to the model that peft wraps.

    Args:
        r: rank where ``rank_pattern`` says nothing.
        alpha: numerator of the scale where ``alpha_pattern`` says nothing.
        targets: names and their tails, or a regular expression, or ``"all-linear"``.
        exclude: names and their tails, or a regular expression.
        layers: numbers of the layers to adapt; ``None`` for all.
        layers_pattern: what such a number comes after.
        rank_pattern: ranks by regular expression.
        alpha_pattern: alphas by regular expression.
        rslora: whether the scale is ``alpha / sqrt(r)``.
        modules_to_save: the ends of the names of modules that are trained in full.
        bias: which biases train.
        dropout: probability of dropping an input of A.
        gaussian: whether A starts as a normal.
        classifies: whether the task has a classification head.
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

    def rank_for(self, name: str) -> int:
        """Rank of the adapter of the module ``name``."""
        return first_key(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        """Alpha of the adapter of the module ``name``."""
        return first_key(self.alpha_pattern, name, self.alpha)

    def scale_for(self, name: str) -> float:
        """Factor in front of ``B A`` for the module ``name``."""
        rank = self.rank_for(name)
        return self.alpha_for(name) / (math.sqrt(rank) if self.rslora else rank)


def first_key(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first regular expression that ``name`` or a tail of it matches, as in peft."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


@dataclass(frozen=True)
class Scaled:
    """Rank and alpha of one module in a file."""

    r: int
    alpha: float


def written_config(
    modules: Mapping[str, Scaled],
    targets: list[str] | str,
    modules_to_save: list[str],
    config: LoRAConfig,
    *,
    base: str | None,
    transposed: bool,
) -> str:
    """The smallest ``adapter_config.json`` from which peft makes this adapter.

    Args:
        modules: rank and alpha of each adapted module.
        targets: what names just these.
        modules_to_save: names of the modules that are trained in full.
        config: what the adapter was made with.
        base: name of the base, as ``from_pretrained`` takes it.
        transposed: whether all linear maps among the modules keep their weight as ``(in, out)``.
    """
    ranks = {name: module.r for name, module in modules.items()}
    alphas = {name: _short(module.alpha) for name, module in modules.items()}
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": _commonest(ranks),
        "lora_alpha": _commonest(alphas),
        "lora_dropout": config.dropout,
        "bias": config.bias,
        "target_modules": targets,
    }
    more = {
        "rank_pattern": _others(ranks),
        "alpha_pattern": _others(alphas),
        "use_rslora": config.rslora,
        "modules_to_save": modules_to_save,
        "fan_in_fan_out": transposed,
    }
    return json.dumps(values | {key: value for key, value in more.items() if value}, indent=2) + "\n"


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _commonest(values: Mapping[str, float]) -> float:
    every = list(values.values())
    return max(dict.fromkeys(every), key=every.count)


def _others(values: Mapping[str, float]) -> dict[str, float]:
    """Those that differ from the commonest, each under an expression that no other name matches."""
    usual = _commonest(values)
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
