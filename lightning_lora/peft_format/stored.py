"""The reader of PEFT directories: ``adapter_config.json`` and the header of ``adapter_model.safetensors``, checked.

All that opens a directory goes through here, with a model or without. As PEFT writes it, the linear layer ``<path>``
has ``base_model.model.<path>.lora_A.weight`` of shape (r, in) and ``.lora_B.weight`` of shape (out, r); an embedding
has ``lora_embedding_A`` and ``lora_embedding_B``; A of a convolution has the shape of its kernel. Every other tensor
replaces one of the base in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lora.files.json_files import read_object, shown
from lightning_lora.files.safetensors import FLOATS, StoredTensor, TensorFile, check_dtypes, open_tensors
from lightning_lora.ops.low_rank import DeltaFactors
from lightning_lora.peft_format.attention import TIMES, attention_around, warn_of_version
from lightning_lora.peft_format.config import PeftConfig, read_config
from lightning_lora.peft_format.provenance import DIGEST, VERSION, check_config, check_digest
from lightning_lora.peft_format.targets import is_targeted

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The ends of the names of A and of B, for a layer and for an embedding.
ENDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}


@dataclass(frozen=True)
class StoredPair:
    """A and B of one layer, not read yet.

    Args:
        name: of the layer.
        A: ``(r, in_features)``, of a convolution ``(r, in, *kernel)``.
        B: ``(out_features, r)``, of a convolution ``(out, r, 1, ...)``.
        scale: factor in front of ``B A``; ``None`` where there is no configuration.
        embedding: whether the layer is an embedding.
        times: how often the update is added.
    """

    name: str
    A: StoredTensor
    B: StoredTensor
    scale: float | None
    embedding: bool
    times: int = 1

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    def features(self) -> tuple[int, int]:
        """``(in_features, out_features)``, the first times the size of a convolution's kernel."""
        return math.prod(self.A.shape[1:]), self.B.shape[0]

    def read(self, dtype: torch.dtype = torch.float64) -> DeltaFactors:
        """``times * scale * B``, shape ``(out_features, r)``, and A, shape ``(r, in_features)``."""
        A, B = (tensor.read().to(dtype).flatten(1) for tensor in (self.A, self.B))
        return self._factor() * B, A

    def read_finite(self, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> DeltaFactors:
        """``factor`` times what :meth:`read` gives, without NaN and infinity.

        Raises:
            ValueError: if there are such numbers.
        """
        A, B = (tensor.read_finite().to(dtype).flatten(1) for tensor in (self.A, self.B))
        return factor * self._factor() * B, A

    def _factor(self) -> float:
        return self.times * (1.0 if self.scale is None else self.scale)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in files; names are relative to the model that peft wraps.

    Args:
        path: the directory, or the file.
        file: its tensors.
        config: its configuration; ``None`` for a file alone.
        values: the same as it is in the file, for people to read.
        pairs: A and B by the layer's name.
        in_full: tensors that replace one of the base, by the name of that one.
    """

    path: Path
    file: TensorFile
    config: PeftConfig | None
    values: dict[str, Any]
    pairs: dict[str, StoredPair]
    in_full: dict[str, StoredTensor]


def open_adapter(path: Path) -> StoredAdapter:
    """Read and check the configuration and the header of a PEFT directory; the values are read later.

    The values are compared with the digest in the header, if there is one.

    Args:
        path: the directory, or its ``.safetensors`` file, which may lie without a configuration.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, is no plain LoRA, or the two do not belong together.
    """
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist: give a PEFT directory.")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        _check_files(path)
    values = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    config = None if values is None else read_config(values)
    file = open_tensors(folder / WEIGHTS if path.is_dir() else path)
    check_dtypes(file)
    if values is not None:
        check_config(file.metadata, values, folder)
    if DIGEST in file.metadata:
        check_digest(file.metadata, {name: tensor.read() for name, tensor in file.tensors.items()})
    halves, in_full, inside = _sorted(file)
    pairs = {name: _pair(name, inside.get(name), both, config, file.path) for name, both in halves.items()}
    if inside and VERSION not in file.metadata:
        warn_of_version(values or {})
    return StoredAdapter(path, file, config, values or {}, pairs, in_full)


def _check_files(directory: Path) -> None:
    if (directory / PICKLED).exists() and not (directory / WEIGHTS).exists():
        raise ValueError(
            f"`{directory}` holds `{PICKLED}`, a pickle, which can run any code when it is read. If you trust it load "
            "it with peft and save it again: PeftModel.from_pretrained(base, directory).save_pretrained(directory)."
        )
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"`{directory}` has no file `{name}`, so it is no PEFT directory.")


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter at ``path``, a directory or a safetensors file."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.suffix == ".safetensors" and any(_end(name) for name in open_tensors(path).tensors)


def config_of(adapter: StoredAdapter) -> PeftConfig:
    """The configuration of ``adapter``.

    Raises:
        FileNotFoundError: if there is none.
    """
    if adapter.config is None:
        raise FileNotFoundError(
            f"`{adapter.path}` has no {CONFIG} in its folder, and that has the scale: give the PEFT directory."
        )
    return adapter.config


def _end(name: str) -> str | None:
    return next((end for end in ENDS if name.endswith(f".{end}")), None)


def _sorted(
    file: TensorFile,
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor], dict[str, str]]:
    """A and B of each layer by the ends of their names, all other tensors, and the attention of pairs inside one."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    inside: dict[str, str] = {}
    in_full: dict[str, StoredTensor] = {}
    for key, tensor in file.tensors.items():
        end = _end(key)
        if not key.startswith(PREFIX) or (end is None and re.search(r"\.(lora_|trainable_tokens_)", key)):
            raise ValueError(
                f"`{file.path}` holds {shown(key)}, which no plain LoRA of peft's has: names begin with {PREFIX!r}, "
                "and a layer has A and B alone."
            )
        place = key.removeprefix(PREFIX).removesuffix("" if end is None else f".{end}")
        name, attention = _without_wrapper(place), attention_around(place)
        if end is not None and attention is not None:
            inside[name] = _without_wrapper(attention)
        group, half = (in_full, name) if end is None else (halves.setdefault(name, {}), end)
        if half in group:
            raise ValueError(f"`{file.path}` has two tensors for {shown(name)}.")
        group[half] = tensor
    if not halves:
        raise ValueError(f"`{file.path}` has no tensors that are called lora_A and lora_B, so it is no LoRA adapter.")
    return halves, in_full, inside


def _without_wrapper(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _pair(
    name: str, attention: str | None, both: Mapping[str, StoredTensor], config: PeftConfig | None, path: Path
) -> StoredPair:
    """The pair of the layer ``name``, which may lie inside the adapted module ``attention``."""
    halves = {ENDS[end]: tensor for end, tensor in both.items()}
    if len(both) != 2 or len(halves) != 2 or len({"embedding" in end for end in both}) != 1:
        raise ValueError(f"{shown(name)} needs one A and one B, but {path} has {', '.join(both)}.")
    A, B = halves["A"], halves["B"]
    _check_shapes(name, A, B, path)
    asked_as, times = (name, 1) if attention is None else (attention, TIMES)
    if config is None:
        return StoredPair(name, A, B, None, "lora_embedding_A" in both, times)
    if not is_targeted(asked_as, config):
        raise ValueError(
            f"{shown(name)} is adapted by {path}, but `target_modules` and `exclude_modules` of {CONFIG} leave it out: "
            "the two files do not belong together."
        )
    if config.rank_for(asked_as) != A.shape[0]:
        raise ValueError(
            f"{shown(name)} has rank {A.shape[0]} in {path}, but {CONFIG} says {config.rank_for(asked_as)}: the two "
            "files do not belong together."
        )
    return StoredPair(name, A, B, config.scale_for(asked_as), "lora_embedding_A" in both, times)


def _check_shapes(name: str, A: StoredTensor, B: StoredTensor, path: Path) -> None:
    if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
        raise ValueError(
            f"{shown(name)} has A of shape {A.shape} and B of shape {B.shape} in {path}, which are no A (r, in) and B "
            "(out, r). (PEFT's adapters of grouped convolutions are like that, and cannot be merged.)"
        )
    if not {A.dtype, B.dtype} <= set(FLOATS):
        raise ValueError(
            f"{shown(name)} has A of {A.dtype} and B of {B.dtype} in {path}, but they must be {', '.join(FLOATS)}."
        )
