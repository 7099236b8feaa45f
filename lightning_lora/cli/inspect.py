"""The contents of files of adapters: PEFT directories, a safetensors file alone, or a checkpoint of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.names import join
from lightning_lora.ops.low_rank import DeltaFactors, norm
from lightning_lora.peft_format.directories import directories_in
from lightning_lora.peft_format.provenance import ADAPTER_CONFIG, BASE, DIGEST
from lightning_lora.peft_format.stored import StoredPair, open_adapter
from lightning_lora.trainer.checkpointing import reading
from lightning_lora.trainer.checkpointing.contents import KEY

RECORDED = ("base_model_name_or_path", "bias", "use_rslora", "modules_to_save", "task_type", "peft_version")
WRITTEN = ("epoch", "global_step", "pytorch-lightning_version")


@dataclass(frozen=True)
class InspectedLayer:
    """One pair.

    Args:
        name: of the layer.
        in_features: columns of A; of a convolution times the size of the kernel.
        out_features: rows of B.
        r: rank.
        scale: factor in front of ``B A``; ``None`` if it is unknown.
        parameters: how many A and B have together.
        norm: the Frobenius norm of delta, of ``B A`` alone where the scale is unknown.
        dtype: of A and B.
        adapter: its name, where there are several.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scale: float | None
    parameters: int
    norm: float
    dtype: str
    adapter: str = ""


@dataclass(frozen=True)
class Inspection:
    """The contents of files of adapters.

    Args:
        path: the directory or file.
        kind: which of the four it is.
        layers: its pairs.
        others: shapes of the other tensors by name.
        nbytes: size of the file with the weights.
        fingerprint: whether it has the fingerprint of its base.
        about: other facts that it records.
        method: its key.
    """

    path: str
    kind: str
    layers: list[InspectedLayer]
    others: dict[str, tuple[int, ...]]
    nbytes: int
    fingerprint: bool
    about: dict[str, Any]
    method: str = "lora"

    def adapters(self) -> list[str]:
        """The names of the adapters, where there are several."""
        return list(dict.fromkeys(layer.adapter for layer in self.layers if layer.adapter))

    def parameters(self, adapter: str = "") -> int:
        """Number of parameters in all pairs, or those of one of several adapters."""
        return sum(layer.parameters for layer in self.layers if adapter in ("", layer.adapter))

    def norm(self, adapter: str = "") -> float:
        """The Frobenius norm of all deltas together, or those of one of several adapters."""
        return math.hypot(*(layer.norm for layer in self.layers if adapter in ("", layer.adapter)))


def inspect_files(path: Path) -> Inspection:
    """Read an adapter, or several, and measure the deltas, without building any of them.

    Args:
        path: a PEFT directory, the safetensors file of one, a directory with sub-directories of several adapters, or a
            ``.ckpt`` that a callback of this package wrote.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it is damaged, or holds no adapter.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp(), "adapter_model.safetensors")
        >>> pair = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(9, 1)}
        >>> save_file({f"base_model.model.up.{key}": value for key, value in pair.items()}, path)
        >>> [(layer.name, layer.r, layer.norm) for layer in inspect_files(path).layers]
        [('up', 1, 6.0)]
    """
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist: give a PEFT directory, a .safetensors file or a .ckpt file.")
    if path.is_dir() and (several := directories_in(path)):
        return _together(path, {name: _peft(place) for name, place in several.items()})
    return _peft(path) if _is_peft(path) else _checkpoint(path)


def read_deltas(path: Path) -> dict[str, list[DeltaFactors]]:
    """The factors of each update in the same files, in fp64, by the name of the layer; several of stacked experts."""
    if path.is_dir() and (several := directories_in(path)):
        every = {name: read_deltas(place) for name, place in several.items()}
        return {f"{layer} ({name})": factors for name, each in every.items() for layer, factors in each.items()}
    if _is_peft(path):
        pairs = sorted(open_adapter(path).pairs.values(), key=lambda pair: _by_number(pair.name))
        return {pair.name: [pair.read()] for pair in pairs}
    checkpoint = reading.read(reading.on_cpu, path, True, "path")
    config, _ = reading.facts_in(checkpoint, path, "path")
    if not isinstance(config, LoRAConfig):
        return {}
    state = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    configs = [*config.each(), *reading.kept_in(checkpoint).values()]
    return {
        f"{_shown(name)} ({each.name})" if len(configs) > 1 else _shown(name): _deltas(
            state[A].double(), state[B].double(), _scale(name, state[A], each)
        )
        for each in configs
        for name, (A, B) in _pairs(state, each).items()
    }


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts blocks by their numbers: a file has the tenth before the second."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _is_peft(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".safetensors"


def _together(path: Path, every: Mapping[str, Inspection]) -> Inspection:
    first, *others = (each.about for each in every.values())
    common = {key for key, value in first.items() if all(key in each and each[key] == value for each in others)}
    about: dict[str, Any] = {}
    for name, each in every.items():
        about |= {key if key in common else f"{key} of {name}": value for key, value in each.about.items()}
    return Inspection(
        path=str(path),
        kind="directory",
        layers=[replace(layer, adapter=name) for name, each in every.items() for layer in each.layers],
        others={f"{key} of {name}": shape for name, each in every.items() for key, shape in each.others.items()},
        nbytes=sum(each.nbytes for each in every.values()),
        fingerprint=all(each.fingerprint for each in every.values()),
        about=about,
    )


def _peft(path: Path) -> Inspection:
    adapter = open_adapter(path)
    layers = [_stored(pair) for pair in adapter.pairs.values()]
    about = {key: adapter.values[key] for key in RECORDED if adapter.values.get(key) not in (None, False)}
    metadata = sorted(adapter.file.metadata.items())  # other tools write them in any order
    about |= {key: value for key, value in metadata if value and key not in (ADAPTER_CONFIG, BASE, DIGEST, "format")}
    return Inspection(
        path=str(path),
        kind="PEFT directory" if path.is_dir() else "adapter file",
        layers=layers,
        others={name: tensor.shape for name, tensor in adapter.in_full.items()},
        nbytes=adapter.file.path.stat().st_size,
        fingerprint=BASE in adapter.file.metadata,
        about=about,
    )


def _stored(pair: StoredPair) -> InspectedLayer:
    size = pair.A.numel() + pair.B.numel()
    return InspectedLayer(pair.name, *pair.features(), pair.r, pair.scale, size, norm(pair.read()), pair.A.dtype)


def _checkpoint(path: Path) -> Inspection:
    checkpoint = reading.read(reading.on_cpu, path, True, "path")
    config, base = reading.facts_in(checkpoint, path, "path")
    state = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    about = {key: checkpoint[key] for key in WRITTEN if key in checkpoint}
    if not isinstance(config, LoRAConfig):
        about |= {**config.to_dict(), "of base": len(base)}
        others = {name: tuple(value.shape) for name, value in state.items()}
        method = checkpoint[KEY]["method"]
        return Inspection(str(path), "checkpoint", [], others, path.stat().st_size, bool(base), about, method)
    trained, kept = config.each(), list(reading.kept_in(checkpoint).values())
    pairs = {each.name: _pairs(state, each) for each in (*trained, *kept)}
    used = {name for of_one in pairs.values() for both in of_one.values() for name in both}
    layers = [
        replace(_live(name, state[A], state[B], each), adapter=each.name if len(pairs) > 1 else "")
        for each in (*trained, *kept)
        for name, (A, B) in pairs[each.name].items()
    ]
    return Inspection(
        path=str(path),
        kind="checkpoint",
        layers=layers,
        others={name: tuple(value.shape) for name, value in state.items() if name not in used},
        nbytes=path.stat().st_size,
        fingerprint=bool(base),
        about={**about, **_described(trained, kept), "of base": len(base)},
    )


def _described(trained: Sequence[LoRAConfig], kept: Sequence[LoRAConfig]) -> dict[str, Any]:
    """The main arguments of the adapters of a checkpoint."""
    if len(trained) == 1 and not kept:
        (config,) = trained
        return {"targets": config.targets, "r": config.r, "alpha": config.alpha, "name": config.name}
    lines = [f"{each.name}: r={each.r}, alpha={each.alpha}, targets={each.targets!r}" for each in trained]
    lines += [f"{each.name} (kept): r={each.r}, alpha={each.alpha}, targets={each.targets!r}" for each in kept]
    return {"adapters": lines}


def _pairs(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[tuple[str, str], tuple[str, str]]:
    """The keys of A and B, by layer and matrix in the layer."""
    pattern = re.compile(rf"(?:(.*)\.)?lora\.{config.name}\.(?:(.+)\.)?A")
    matches = {key: pattern.fullmatch(key) for key in state}
    return {
        (match[1] or "", match[2] or ""): (key, f"{key[:-1]}B")
        for key, match in matches.items()
        if match is not None and f"{key[:-1]}B" in state and state[key].dim() in (2, 3)
    }


def _live(name: tuple[str, str], A: Tensor, B: Tensor, config: LoRAConfig) -> InspectedLayer:
    r, size = A.shape[-2], A.numel() + B.numel()
    if A.dim() != B.dim() or B.shape[-1] != r:
        raise ValueError(f"`{join(*name)}` has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}: damaged.")
    scale = _scale(name, A, config)
    dtype, total = str(A.dtype).removeprefix("torch."), math.hypot(*map(norm, _deltas(A, B, scale)))
    return InspectedLayer(_shown(name), A.shape[-1], B.shape[-2], r, scale, size, total, dtype)


def _shown(name: tuple[str, str]) -> str:
    return ".".join(part for part in name if part)


def _scale(name: tuple[str, str], A: Tensor, config: LoRAConfig) -> float | None:
    """``None`` where the rank is not the one that the configuration gives the layer."""
    known_as = (join(*name), name[0]) if name[1] else (name[0],)
    return config.scale_for(*known_as) if config.rank_for(*known_as) == A.shape[-2] else None


def _deltas(A: Tensor, B: Tensor, scale: float | None) -> list[DeltaFactors]:
    factor = 1.0 if scale is None else scale
    return [(factor * b, a) for b, a in zip(_stack(B), _stack(A), strict=True)]


def _stack(matrix: Tensor) -> list[Tensor]:
    return list(matrix) if matrix.dim() == 3 else [matrix]
