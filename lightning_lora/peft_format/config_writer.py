"""The smallest ``adapter_config.json`` from which peft makes the same adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.config import LoRAConfig


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
    auto: Mapping[str, Any] | None = None,
) -> str:
    """The smallest ``adapter_config.json`` from which peft makes this adapter.

    Args:
        modules: rank and alpha of each adapted module.
        targets: ``target_modules`` that match these and no others.
        modules_to_save: names of the modules that are trained in full.
        config: the configuration of the adapter.
        base: name of the base, as ``from_pretrained`` takes it.
        transposed: whether all linear layers among the modules have a weight of shape ``(in, out)``.
        auto: the keys by which peft's Auto classes find the class of the base; ``None`` where it is not known.
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
        **(auto or {}),
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
    """The values that differ from the commonest, each under an expression that no other name matches."""
    usual = _commonest(values)
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
