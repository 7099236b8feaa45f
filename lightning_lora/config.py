"""What the user asks for: one frozen dataclass, validated in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from lightning_lora.names import first_match

PRESETS = ("attn", "qv", "mlp", "all")
BASE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITS = ("kaiming", "gaussian")
BIASES = ("none", "all", "lora_only")
MERGES = (True, False, "last", "best")


@dataclass(frozen=True)
class LoRAConfig:
    """The arguments of an adapter (Hu et al. 2021, arXiv 2106.09685): ``h = W0 x + scale * B A x``.

    Patterns (in ``targets``, ``exclude``, ``also_train`` and the keys of ``rank_pattern`` and ``alpha_pattern``) are
    suffixes of dotted module names (``"q_proj"``, ``"attn.q_proj"``), globs (``"layers.*.q_proj"``, matched against
    the name and its dotted tails) or ``"re:"`` followed by a regular expression that matches the whole name.

    Args:
        r: rank of the update; A has shape ``(r, in_features)``, B ``(out_features, r)``.
        alpha: numerator of the scale ``alpha / r``; ``None`` means ``alpha = r``, a scale of 1.
        targets: a preset (``"attn"``, ``"qv"``, ``"mlp"``, ``"all"``) or a list of patterns.
        exclude: patterns of modules to leave alone, with all that is inside them.
        dropout: probability with which the input of the adapter, not of the layer, is dropped in training. An
            embedding's adapter has none: its input is one index.
        init: ``"kaiming"`` (A as the weight of ``nn.Linear``) or ``"gaussian"`` (A normal with standard deviation
            ``1 / r``); B is zero, so the model starts as the base.
        rslora: scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv 2312.03732).
        bias: which biases train too: ``"none"``, ``"lora_only"`` (those of adapted layers) or ``"all"``.
        also_train: patterns of modules or parameters that are trained in full and saved with the adapters.
        rank_pattern: ranks that differ from ``r``, by pattern; the first key that matches counts.
        alpha_pattern: alphas that differ from ``alpha``, by pattern.
        seed: seed of A; ``None`` takes the one that ``seed_everything`` set, else 0.
        lr_scale: factor on the learning rate of optimizer groups that hold adapters. Read by the callback.
        merge: ``True`` or ``"last"``, ``"best"`` (the best checkpoint's adapters) or ``False``. Read by the callback.
        name: name of the adapter; its parameters are ``<layer>.lora.<name>.A`` and ``.B``.
        liveness: check that every adapter runs and gets a gradient. Read by the callback.
        init_from: PEFT directory, or checkpoint of another run, that fresh adapters start from. Read by the callback.
        export: directory in which the end of fit writes the adapters in PEFT's format. Read by the callback.
        base_dtype: dtype in which frozen weights are kept during a run under mixed precision, ``"bf16"`` or
            ``"fp16"``; ``None`` leaves them as they are. Read by the callback.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type.

    Example:
        >>> LoRAConfig(r=4, targets=["q_proj", "v_proj"]).scale_for("layers.0.q_proj")
        1.0
    """

    r: int = 8
    alpha: float | None = None
    targets: str | Sequence[str] = "attn"
    exclude: Sequence[str] | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False
    bias: str = "none"
    also_train: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    seed: int | None = None
    lr_scale: float = 1.0
    merge: bool | str = True
    name: str = "default"
    liveness: bool = True
    init_from: str | None = None
    export: str | None = None
    base_dtype: str | None = None

    def __post_init__(self) -> None:
        """Check every argument and keep copies of lists; everything else may then rely on it."""
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)
        _check_targets(self.targets)
        _check_patterns("exclude", self.exclude)
        _check_patterns("also_train", self.also_train)
        for key, rank in _checked_mapping("rank_pattern", self.rank_pattern):
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in _checked_mapping("alpha_pattern", self.alpha_pattern):
            _check_positive(f"alpha_pattern[{key!r}]", alpha)
        if not _is_number(self.dropout):
            raise TypeError(f"`dropout` must be a number, but got {self.dropout!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be a probability in [0, 1), but got {self.dropout!r}.")
        _check_choice("init", self.init, INITS)
        _check_choice("bias", self.bias, BIASES)
        _check_choice("merge", self.merge, MERGES)
        _check_choice("base_dtype", self.base_dtype, (None, *BASE_DTYPES))
        _check_positive("lr_scale", self.lr_scale)
        for argument in ("rslora", "liveness"):
            if not isinstance(getattr(self, argument), bool):
                raise TypeError(f"`{argument}` must be a bool, but got {getattr(self, argument)!r}.")
        for argument in ("init_from", "export"):
            if not isinstance(getattr(self, argument), (str, type(None))):
                raise TypeError(f"`{argument}` must be a path as a string, but got {getattr(self, argument)!r}.")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise TypeError(f"`seed` must be an integer or None, but got {self.seed!r}.")
        _check_name(self.name)
        for field in fields(self):
            object.__setattr__(self, field.name, _own_copy(getattr(self, field.name)))

    def rank_for(self, *names: str) -> int:
        """Rank of the adapter of the module with these names."""
        return first_match(names, self.rank_pattern or {}, self.r)

    def alpha_for(self, *names: str) -> float:
        """Alpha of the adapter of the module with these names: its pattern's, else ``alpha``, else its rank."""
        rank = self.rank_for(*names)
        return first_match(names, self.alpha_pattern or {}, float(rank if self.alpha is None else self.alpha))

    def scale_for(self, *names: str) -> float:
        """Factor in front of ``B A`` for the module with these names."""
        rank = self.rank_for(*names)
        return self.alpha_for(*names) / (math.sqrt(rank) if self.rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain data that ``torch.load(weights_only=True)`` accepts."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _own_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else _own_copy(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rank(argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be an integer, but got {value!r}.")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, but got {value}. To train no adapter, leave LoRA out.")


def _check_positive(argument: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"`{argument}` must be a number, but got {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"`{argument}` must be positive and finite, but got {value}.")


def _check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def _check_targets(targets: Any) -> None:
    if isinstance(targets, str):
        if targets not in PRESETS:
            raise ValueError(
                f"`targets` must be one of the presets {', '.join(map(repr, PRESETS))} or a list of module names, "
                f"but got {targets!r}. To adapt modules of that name write targets=[{targets!r}]."
            )
        return
    _check_patterns("targets", targets)
    if not targets:
        raise ValueError(f"`targets` must name at least one module, but got {targets!r}.")


def _checked_mapping(argument: str, value: Any) -> list[tuple[str, Any]]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"`{argument}` must be a dict from module names to numbers, but got {value!r}.")
    _check_patterns(argument, None if value is None else list(value))
    return list((value or {}).items())


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name` must be a Python identifier, as it becomes a module name, but got {name!r}.")


def _check_patterns(argument: str, patterns: Any) -> None:
    if patterns is None and argument != "targets":
        return
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"`{argument}` must be a list of module names, but got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern or pattern == "re:":
            raise TypeError(f"`{argument}` must hold module names as non-empty strings, but got {pattern!r}.")
        if pattern.startswith("re:"):
            _check_expression(argument, pattern)


def _check_expression(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"`{argument}` has {pattern!r}, which is not a regular expression: {error}.") from error
