"""A PEFT directory without a model: pairs from ``adapter_model.safetensors``, scales from ``adapter_config.json``.

As PEFT writes it, the map ``<path>`` has ``base_model.model.<path>.lora_A.weight`` of shape (r, in) and
``.lora_B.weight`` of shape (out, r); an embedding has ``lora_embedding_A`` and ``lora_embedding_B``, a convolution's A
has its kernel. What else there is replaces a tensor of the base whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lora.files.json_files import read_object
from lightning_lora.files.safetensors import FLOATS, StoredTensor, TensorFile, open_tensors
from lightning_lora.ops.low_rank import DeltaFactors
from lightning_lora.peft_format.provenance import DIGEST, check_digest

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTORS = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
# What makes an adapter something else than W + scale * B A, by the field of the configuration.
OTHERWISE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class StoredPair:
    """A and B of one map, not read yet; ``scale`` is unknown where no configuration is beside them."""

    name: str
    A: StoredTensor
    B: StoredTensor
    scale: float | None
    embedding: bool

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    def features(self) -> tuple[int, int]:
        """``(in_features, out_features)``, the first times the size of a convolution's kernel."""
        return math.prod(self.A.shape[1:]), self.B.shape[0]

    def read(self, dtype: torch.dtype = torch.float64) -> DeltaFactors:
        """B with the scale in it, shape ``(out_features, r)``, and A, shape ``(r, in_features)``."""
        A, B = (tensor.read().to(dtype).flatten(1) for tensor in (self.A, self.B))
        return (1.0 if self.scale is None else self.scale) * B, A

    def read_finite(self, dtype: torch.dtype = torch.float64) -> DeltaFactors:
        """The same.

        Raises:
            ValueError: if a number in them is not finite.
        """
        B, A = self.read(dtype)
        for tensor, value in ((self.A, A), (self.B, B)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"`{tensor.name}` in {tensor.path} has NaN or infinite numbers: its training failed.")
        return B, A


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in files.

    Args:
        path: the directory, or the file.
        file: its tensors.
        config: what its configuration holds; empty for a file alone.
        pairs: A and B by the map's name.
        whole: tensors that replace one of the base, by that one's name.
    """

    path: Path
    file: TensorFile
    config: dict[str, Any]
    pairs: dict[str, StoredPair]
    whole: dict[str, StoredTensor]


def open_adapter(path: Path) -> StoredAdapter:
    """Read the headers of a PEFT directory, or of the ``.safetensors`` file of one.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, its tensors are no adapter's, or they do not fit the configuration.
    """
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if path.is_dir() and not config.is_file():
        raise FileNotFoundError(f"`{path}` has no {CONFIG}, so it is no PEFT directory.")
    file = open_tensors(path / WEIGHTS if path.is_dir() else path)
    if DIGEST in file.metadata:
        check_digest(file.metadata, {name: tensor.read() for name, tensor in file.tensors.items()})
    found = read_object(config) if config.is_file() else {}
    if found:
        _check_config(config, found)
    pairs, whole = _sorted(file, found)
    return StoredAdapter(path, file, found, pairs, whole)


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter at ``path``, a directory or a safetensors file."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.suffix == ".safetensors" and any(FACTORS.fullmatch(name) for name in open_tensors(path).tensors)


def check_plain(adapter: StoredAdapter) -> None:
    """Raise unless the adapter is ``W + scale * B A`` on the base as it is.

    Raises:
        ValueError: naming what it is instead.
    """
    if not adapter.config:
        raise FileNotFoundError(
            f"`{adapter.path}` has no {CONFIG} beside it, and that has the scale: give its directory."
        )
    for field in OTHERWISE:
        if adapter.config.get(field):
            raise ValueError(
                f"`{adapter.path}` was trained with `{field}`, so its weights are not W + scale * B A. Load it in "
                "peft and merge it there."
            )
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"`{adapter.path}` was started with init_lora_weights={start!r}, which changes the base, so it does not "
            "belong to the base as published. Save it in peft with `path_initial_model_for_weight_conversion` first."
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"`{path}` must describe LoRA, but has peft_type={config.get('peft_type')!r}.")
    _check_number(path, "r", config.get("r"))
    _check_number(path, "lora_alpha", config.get("lora_alpha"))
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise ValueError(f"`{path}` must have true or false as `use_rslora`, but has {config['use_rslora']!r}.")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"`{path}` must have a dict as `{field}`, but has {patterns!r}.")
        for pattern, value in patterns.items():
            _check_number(path, f"{field}[{pattern!r}]", value)
            _check_pattern(path, field, pattern)


def _check_number(path: Path, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ValueError(f"`{path}` must have a positive number as `{field}`, but has {value!r}.")


def _check_pattern(path: Path, field: str, pattern: str) -> None:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError) as error:
        raise ValueError(f"`{path}` has {pattern!r} in `{field}`, which is no regular expression: {error}.") from error


def _of_pattern(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    """The value for the map ``name``, by PEFT's rule: of the first pattern that it or a dotted tail of it matches."""
    patterns = config.get(field) or {}
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, default)


def _scale(config: Mapping[str, Any], name: str, r: int) -> float:
    alpha = _of_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _sorted(file: TensorFile, config: Mapping[str, Any]) -> tuple[dict[str, StoredPair], dict[str, StoredTensor]]:
    factors: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for key, tensor in file.tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(
                f"`{key}` in {file.path} does not begin with {PREFIX!r}, as the names of PEFT's adapters do."
            )
        found = FACTORS.fullmatch(key.removeprefix(PREFIX))
        if found is not None:
            name = _without_wrapper(found[1])
            if found[3] in factors.setdefault(name, {}):
                raise ValueError(
                    f"`{name}` has two pairs in {file.path} (`target_parameters`?), which are not read here."
                )
            factors[name][found[3]] = tensor
        elif re.search(r"\.(lora_|trainable_tokens_)", key):
            raise ValueError(f"`{key}` in {file.path} is no part of a plain LoRA adapter, which has A and B alone.")
        else:
            whole[_without_wrapper(key.removeprefix(PREFIX))] = tensor
    if not factors:
        raise ValueError(f"`{file.path}` has no tensors that are called lora_A and lora_B, so it is no LoRA adapter.")
    return {name: _pair(name, both, config, file.path) for name, both in factors.items()}, whole


def _without_wrapper(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _pair(name: str, both: Mapping[str, StoredTensor], config: Mapping[str, Any], path: Path) -> StoredPair:
    for letter in "AB":
        if letter not in both:
            raise ValueError(f"`{name}` has no lora_{letter} in {path}: the file is damaged.")
    A, B = both["A"], both["B"]
    if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
        raise ValueError(
            f"`{name}` has A of shape {A.shape} and B of shape {B.shape} in {path}, which are no A (r, in) and B "
            "(out, r). (PEFT's adapters of grouped convolutions are like that, and cannot be merged.)"
        )
    if not {A.dtype, B.dtype} <= set(FLOATS):
        raise ValueError(
            f"`{name}` has A of {A.dtype} and B of {B.dtype} in {path}, but they must be {', '.join(FLOATS)}."
        )
    said = _of_pattern(config, "rank_pattern", name, config["r"]) if config else A.shape[0]
    if said != A.shape[0]:
        raise ValueError(
            f"`{name}` has rank {A.shape[0]} in {path}, but {CONFIG} says {said}: they do not belong together."
        )
    embedding = "lora_embedding_" in A.name
    return StoredPair(name, A, B, _scale(config, name, A.shape[0]) if config else None, embedding)
