"""What the user asks for: what is adapted and how, and what a run does with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from lightning_lora.arguments import (
    check_adapters,
    check_argument_names,
    check_base_dtype,
    check_choice,
    check_factors,
    check_flag,
    check_mapping,
    check_merge,
    check_merge_base,
    check_number,
    check_path,
    check_patterns,
    check_positive,
    check_rank,
    check_route,
    check_targets,
    plain_data,
)
from lightning_lora.names import first_match

PRESETS = ("attn", "qv", "mlp", "all")
OTHER_WORDS = {"all-linear": "all"}  # peft's word for a preset
BASE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITS = ("kaiming", "gaussian")
BIASES = ("none", "all", "lora_only")
MERGES = (True, False, "last", "best")
SAVES = ("adapter", "merged")
OWN_ARGUMENTS = ("r", "alpha", "targets", "dropout", "rslora", "rank_pattern", "alpha_pattern", "lr_scale")
SIDES = ("auto", "activations", "weights")


class MethodConfig(Protocol):
    """The arguments of a method: a frozen dataclass of plain data."""

    @property
    def name(self) -> str:
        """The name of what the method adds, for methods that can be on one model several times."""

    @property
    def bias(self) -> str:
        """Which biases train in addition, as of :class:`LoRAConfig`."""

    @property
    def also_train(self) -> Sequence[str] | None:
        """Patterns of modules or parameters that are trained in full."""

    @property
    def exclude(self) -> Sequence[str] | None:
        """Patterns of modules that are left as they are."""

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain data that ``torch.load(weights_only=True)`` accepts."""


def scale_of(alpha: float, r: int, rslora: bool) -> float:
    """The factor in front of ``B A``: ``alpha / r``, or ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(r) if rslora else r)


def alpha_of(scale: float, r: int, rslora: bool) -> float:
    """The alpha that gives ``scale``."""
    return scale * (math.sqrt(r) if rslora else r)


@dataclass(frozen=True)
class LoRAConfig:
    """The arguments of an adapter (Hu et al. 2021, arXiv 2106.09685): ``h = W0 x + scale * B A x``.

    Patterns (in ``targets``, ``exclude``, ``also_train`` and the keys of ``rank_pattern`` and ``alpha_pattern``) are
    suffixes of dotted module names (``"q_proj"``, ``"attn.q_proj"``), globs (``"layers.*.q_proj"``, matched against
    the name and its dotted tails) or ``"re:"`` followed by a regular expression that matches the whole name.
    Expressions with back-references, conditions or unbounded repeats inside each other are refused.

    Args:
        r: rank of the update; A has shape ``(r, in_features)``, B ``(out_features, r)``.
        alpha: numerator of the scale ``alpha / r``; ``None`` means ``alpha = r``, a scale of 1.
        targets: a preset (``"attn"``, ``"qv"``, ``"mlp"``, ``"all"``, which may be written ``"all-linear"``) or a list
            of patterns and presets. In a list a layer of that name takes precedence over the preset.
        exclude: patterns of modules that get no adapters, with all that is inside them; ``None`` excludes nothing.
        dropout: probability with which the input of the adapter, not of the layer, is dropped in training. An
            embedding's adapter has none: its input is one index.
        init: ``"kaiming"`` (A as the weight of ``nn.Linear``) or ``"gaussian"`` (A normal with standard deviation
            ``1 / r``); B is zero, so the model starts as the base.
        rslora: scale by ``alpha / sqrt(r)`` instead of ``alpha / r`` (Kalajdzievski 2023, arXiv 2312.03732).
        bias: which biases train too: ``"none"``, ``"lora_only"`` (those of adapted layers) or ``"all"``.
        also_train: patterns of modules or parameters that are trained in full and saved with the adapters; ``None``
            trains only adapters.
        rank_pattern: ranks that differ from ``r``, by pattern; the first key that matches counts. ``None``: no others.
        alpha_pattern: alphas that differ from ``alpha``, by pattern, in the same way.
        seed: seed of A; ``None`` takes the one that ``seed_everything`` set, else 0.
        name: name of the adapter; its parameters are ``<layer>.lora.<name>.A`` and ``.B``.
        adapters: several adapters by name in place of the one called ``name``, each with the arguments in which it
            differs from these: ``r``, ``alpha``, ``targets``, ``dropout``, ``rslora``, ``rank_pattern``,
            ``alpha_pattern``, and for a run ``lr_scale``.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value has the wrong type, or is an argument of a run: those are LoRACallback's.

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
    name: str = "default"
    adapters: Mapping[str, Mapping[str, Any]] | None = None

    def __new__(cls, *_: Any, **arguments: Any) -> LoRAConfig:
        """Say where the arguments of a run belong, which ``apply_lora`` could not follow, and what peft's are here."""
        check_argument_names(cls.__name__, arguments, (field.name for field in fields(cls)))
        for field in fields(RunConfig):
            if field.name in arguments:
                raise TypeError(
                    f"`{field.name}` is an argument of LoRACallback, not of LoRAConfig: it says what a run does. Write "
                    f"LoRACallback({field.name}=...)."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Make every argument plain data and check it; everything else may then rely on it."""
        _make_plain(self)
        object.__setattr__(self, "targets", _in_our_words(self.targets))
        check_rank("r", self.r)
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        check_targets(self.targets, PRESETS)
        for argument in ("exclude", "also_train"):
            if getattr(self, argument) is not None:
                check_patterns(argument, getattr(self, argument))
        for argument, check in (("rank_pattern", check_rank), ("alpha_pattern", check_positive)):
            if getattr(self, argument) is not None:
                check_mapping(argument, getattr(self, argument))
                for key, value in getattr(self, argument).items():
                    check(f"{argument}[{key!r}]", value)
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be a probability in [0, 1), but got {self.dropout!r}.")
        check_choice("init", self.init, INITS)
        check_choice("bias", self.bias, BIASES)
        check_flag("rslora", self.rslora)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise TypeError(f"`seed` must be an integer or None, but got {self.seed!r}.")
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"`name` must be a Python identifier, as it becomes a module name, but got {self.name!r}.")
        if self.adapters is not None:
            check_adapters(self.adapters, self.name, OWN_ARGUMENTS)
            self.each()  # their arguments are checked too

    def each(self) -> list[LoRAConfig]:
        """The configuration of each adapter: this one, or that of each of ``adapters``.

        Example:
            >>> [(config.name, config.r) for config in LoRAConfig(r=8, adapters={"fr": {}, "de": {"r": 4}}).each()]
            [('fr', 8), ('de', 4)]
        """
        if self.adapters is None:
            return [self]
        alone = {**self.to_dict(), "adapters": None}
        return [
            LoRAConfig(**{**alone, **{key: value for key, value in own.items() if key != "lr_scale"}, "name": name})
            for name, own in self.adapters.items()
        ]

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The configuration that :meth:`to_dict` wrote; files of format 1 hold the arguments of the run as well."""
        of_the_run = {field.name for field in fields(RunConfig)}
        return cls(**{key: value for key, value in values.items() if key not in of_the_run})

    def rank_for(self, *names: str) -> int:
        """Rank of the adapter of the module with these names."""
        return first_match(names, self.rank_pattern or {}, self.r)

    def alpha_for(self, *names: str) -> float:
        """Alpha of the adapter of the module with these names: its pattern's, else ``alpha``, else its rank."""
        rank = self.rank_for(*names)
        return first_match(names, self.alpha_pattern or {}, float(rank if self.alpha is None else self.alpha))

    def scale_for(self, *names: str) -> float:
        """Factor in front of ``B A`` for the module with these names."""
        return scale_of(self.alpha_for(*names), self.rank_for(*names), self.rslora)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain data that ``torch.load(weights_only=True)`` accepts."""
        return {field.name: plain_data(getattr(self, field.name)) for field in fields(self)}


def check_compute(compute: str, config: LoRAConfig) -> None:
    """Raise if layers adapted by ``config`` cannot compute on the side that ``compute`` names.

    Raises:
        ValueError: if they cannot, or there is no such side.
        TypeError: if ``compute`` is no string.
    """
    check_choice("compute", compute, SIDES)
    if compute == "weights" and config.dropout:
        raise ValueError(
            "`compute='weights'` sums W0 and B A, so A has no input of its own to drop, but got "
            f"dropout={config.dropout}. Set dropout=0, or leave `compute` out."
        )


@dataclass(frozen=True)
class RunConfig:
    """What a run does with its adapters, whatever they are: the arguments of a callback that no module needs.

    Args:
        lr_scale: factor on the learning rate of optimizer groups that hold adapters.
        merge: ``True`` or ``"last"``, ``"best"`` (the best checkpoint's adapters), ``False``, or factors by adapter.
        liveness: check that every adapter runs and gets a gradient.
        init_from: PEFT directory, or checkpoint of another run, that fresh adapters start from.
        export: directory in which the end of fit writes the adapters in PEFT's format.
        base_dtype: dtype of frozen weights during a run under mixed precision, ``"bf16"`` or ``"fp16"``, or ``None``.
        save: ``"adapter"``, or ``"merged"`` for checkpoints that hold the merged state dict as well.
        merged: safetensors file into which the end of fit writes the merged model.
        dequantize: merge adapters on a quantized base into the dequantized weights.
        merge_base: file or directory whose weights in full precision they are merged into instead.
        compute: the side of the equation: ``"auto"``, ``"activations"`` or ``"weights"``; see :func:`apply_lora`.
        route: the entry of a batch that says which adapter each sample uses; ``None`` where all act.
        balance: divide each adapter's gradient by its share of the samples.
        keep: adapters of earlier runs that stay as they are, with their strengths.

    Raises:
        ValueError, TypeError: if a value is out of its range, or has the wrong type.
    """

    lr_scale: float = 1.0
    merge: bool | str | Mapping[str, float] = True
    liveness: bool = True
    init_from: str | None = None
    export: str | None = None
    base_dtype: str | None = None
    save: str = "adapter"
    merged: str | None = None
    dequantize: bool = False
    merge_base: str | None = None
    compute: str = "auto"
    route: str | int | None = None
    balance: bool = False
    keep: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Make every argument plain data and check it."""
        _make_plain(self)
        check_positive("lr_scale", self.lr_scale)
        check_merge(self.merge, MERGES)
        check_route(self.route, self.balance)
        check_factors("keep", self.keep or {})
        check_flag("liveness", self.liveness)
        merges = self.merge is not False or self.merged is not None
        check_merge_base("merge_base", self.merge_base, self.dequantize, merges)
        for argument in ("init_from", "export", "merged"):
            check_path(argument, getattr(self, argument))
        check_choice("base_dtype", self.base_dtype, (None, *BASE_DTYPES))
        check_choice("save", self.save, SAVES)
        check_choice("compute", self.compute, SIDES)
        check_base_dtype(self.base_dtype, self.compute, self.save)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _make_plain(config: LoRAConfig | RunConfig) -> None:
    for field in fields(config):
        object.__setattr__(config, field.name, plain_data(getattr(config, field.name)))


def _in_our_words(targets: Any) -> Any:
    if isinstance(targets, list):
        return [_in_our_words(target) if isinstance(target, str) else target for target in targets]
    return OTHER_WORDS.get(targets, targets) if isinstance(targets, str) else targets
