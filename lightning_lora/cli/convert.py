"""A run's checkpoint to PEFT directories: from files to files, without the model.

A checkpoint records the shapes of the base and the kind of each adapted layer in PEFT's format. What needs more than
that goes through the module: ``save_adapter(load_from_checkpoint(...), ...)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.output import check_free
from lightning_lora.config import LoRAConfig
from lightning_lora.files.atomic import write_together
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.names import join, nearest
from lightning_lora.peft_format.config_writer import Scaled, written_config
from lightning_lora.peft_format.directories import places_for
from lightning_lora.peft_format.layers import KINDS
from lightning_lora.peft_format.provenance import header
from lightning_lora.peft_format.save import file_writers
from lightning_lora.peft_format.stored import PREFIX, WEIGHTS
from lightning_lora.peft_format.targets import exact_targets
from lightning_lora.peft_format.task import BASE, CLASSES, recorded_classes
from lightning_lora.trainer.checkpointing import contents, reading

THROUGH = "Export it from the module: save_adapter(load_from_checkpoint(YourModule, path), directory)."
KEYS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class Exported:
    """The written files.

    Args:
        path: the directory or checkpoint.
        inner: name of the module that the adapter's names are relative to.
        layers: names of the adapted layers, relative to it.
        nbytes: size of the files with the weights.
        adapters: the names of the sub-directories, where there are several adapters.
    """

    path: str
    inner: str
    layers: list[str]
    nbytes: int
    adapters: list[str] = field(default_factory=list)


Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B by the name of their layer


def export_checkpoint(
    path: Path, directory: Path, inner: str | None = None, overwrite: bool = False, name: str | None = None
) -> Exported:
    """Write the adapters in the checkpoint ``path`` of a run as PEFT directories: several into sub-directories.

    Args:
        path: a ``.ckpt`` that a Trainer with LoRACallback wrote.
        directory: where to write.
        inner: name of the module of the LightningModule that peft will wrap; ``None``: the one that holds everything.
        overwrite: replace an adapter in ``directory``.
        name: of the one adapter to write, into ``directory`` itself; ``None`` writes all.

    Raises:
        FileExistsError: if ``directory`` has an adapter already.
        ValueError: if the file is damaged, holds what only the module can place, or no adapter of this name.
    """
    _check_is_file(path)
    checkpoint = reading.read(reading.on_cpu, path, True, "CKPT")
    config, base = reading.lora_facts_in(checkpoint, path, "CKPT")
    configs = {each.name: each for each in (*config.each(), *reading.kept_in(checkpoint).values())}
    pairs = _pairs(checkpoint["state_dict"], list(configs), path)
    wanted = list(configs) if name is None else [_known(name, configs, path)]
    places = places_for(wanted, directory, name)
    for place in places.values():
        check_free(place / WEIGHTS, overwrite)
    classes = recorded_classes(checkpoint[contents.KEY].get(CLASSES))
    every = {layer for of_one in pairs.values() for layer in of_one}
    prefix = _wrapped(classes, base, every) if inner is None else inner
    part = _Part(checkpoint, path, prefix, base, classes.get(prefix, {}), len(configs) > 1)
    strengths = reading.strengths_in(checkpoint) if len(wanted) > 1 else {}
    files = {places[each]: _files(part, configs[each], pairs[each], strengths.get(each, 1.0)) for each in wanted}
    write_together(files)
    layers = dict.fromkeys(_relative(layer, prefix) for each in wanted for layer in pairs[each])
    size = sum((place / WEIGHTS).stat().st_size for place in places.values())
    return Exported(str(directory), prefix, list(layers), size, wanted if len(wanted) > 1 else [])


def _known(name: str, configs: Mapping[str, LoRAConfig], path: Path) -> str:
    if name not in configs:
        close = ", ".join(f"`{each}`" for each in nearest(name, list(configs)))
        raise ValueError(f"`--name` must be that of an adapter in `{path}`, but got {name!r}. It holds {close}.")
    return name


@dataclass(frozen=True)
class _Part:
    """A checkpoint, and the part of its model that peft wraps.

    Args:
        checkpoint: what is in the file.
        path: of the file.
        prefix: the name of the part.
        base: the fingerprint of the whole base.
        classes: what the file records of the part's class.
        has_several: whether the file holds several adapters.
    """

    checkpoint: Mapping[str, Any]
    path: Path
    prefix: str
    base: Fingerprint
    classes: Mapping[str, Any]
    has_several: bool

    def kind_of(self, layer: str, adapter: str) -> str:
        """The kind of an adapted layer."""
        key = join(layer, f"lora.{adapter}") if self.has_several else layer
        return _kind(key, layer, self.checkpoint[contents.KEY], self.path)


def _files(part: _Part, config: LoRAConfig, pairs: Pairs, strength: float) -> dict[str, Callable[[Path], object]]:
    """What writes the two files of one adapter."""
    relative = {name: _relative(name, part.prefix) for name in pairs}
    below = {_relative(name, part.prefix): sums for name, sums in part.base.items() if _lies_in(name, part.prefix)}
    kinds = {name: part.kind_of(name, config.name) for name in pairs}
    tensors: dict[str, Tensor] = {}
    for name, both in pairs.items():
        shaped = _shaped(both, kinds[name], _shape(name, part.base))
        matrices = zip(KEYS[kinds[name] == "embedding"], shaped, strict=True)
        tensors |= {f"{PREFIX}{relative[name]}.{key}": value for key, value in matrices}
    text = written_config(
        {relative[name]: Scaled(A.shape[0], config.alpha_for(name)) for name, (A, _) in pairs.items()},
        exact_targets(list(relative.values()), skeleton(_shapes(below))),
        [],
        config,
        base=part.classes.get(BASE),
        transposed=set(kinds.values()) - {"embedding", "convolution"} == {"transposed"},
        auto={key: value for key, value in part.classes.items() if key != BASE},
    )
    about = {"step": str(part.checkpoint.get("global_step", 0)), "epoch": str(part.checkpoint.get("epoch", 0))}
    return file_writers(text, tensors, header(config, below, tensors, about, part.prefix, strength))


def _check_is_file(path: Path) -> None:
    """Raise unless there is a file at ``path`` that may be a checkpoint."""
    if not Path(path).exists():
        raise FileNotFoundError(f"`{path}` does not exist: give the .ckpt of a run with LoRACallback.")
    if Path(path).is_dir() or str(path).endswith(".safetensors"):
        raise ValueError(
            f"`{path}` is no checkpoint: CKPT must be the .ckpt of a run with LoRACallback. A PEFT directory and its "
            "safetensors file need no export; `lightning-lora inspect PATH` shows them."
        )


def _pairs(state: Mapping[str, Any], names: Sequence[str], path: Path) -> dict[str, Pairs]:
    """For each adapter A and B by the name of their layer."""
    halves: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in names}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        match = re.fullmatch(rf"(.+)\.lora\.({'|'.join(names)})\.([AB])", key)
        if match is None or value.dim() != 2:
            what = "a slice or a stack of a layer" if ".lora." in key else "trained in addition to the adapters"
            raise ValueError(f"`{path}` holds `{key}`, {what}, which only the module can place. {THROUGH}")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"`{path}`: `{key}` must hold finite numbers: its training failed, or it is damaged.")
        halves[match[2]].setdefault(match[1], {})[match[3]] = value
    return {name: _both(of_one, path) for name, of_one in halves.items()}


def _both(halves: Mapping[str, Mapping[str, Tensor]], path: Path) -> Pairs:
    for name, pair in halves.items():
        if set(pair) != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise ValueError(f"`{path}` is damaged: A and B of `{name}` do not fit.")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _shapes(base: Fingerprint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(size for size in sums[3:] if size is not None) for name, sums in base.items()}


def _shape(name: str, base: Fingerprint) -> tuple[int, ...]:
    return _shapes(base).get(f"{name}.weight", ())


def _kind(key: str, name: str, facts: Mapping[str, Any], path: Path) -> str:
    """The kind of the layer ``name``, as the run recorded it under ``key``.

    Raises:
        ValueError: if PEFT's format has no place for it, or the file does not record it.
    """
    kinds = facts.get("kinds")
    kind = kinds.get(key) if isinstance(kinds, dict) else None
    if kind not in KINDS:
        reason = kind if isinstance(kind, str) else "is of a kind that the file does not record"
        raise ValueError(f"`{path}`: `{name}` {reason}. {THROUGH}")
    return str(kind)


def _shaped(pair: tuple[Tensor, Tensor], kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    A, B = (matrix.float().contiguous() for matrix in pair)
    if kind == "convolution":
        A, B = A.view(len(A), *shape[1:]), B.view(*B.shape, *[1] * (len(shape) - 2))
    return A, B


def _wrapped(classes: Mapping[str, object], base: Fingerprint, adapted: Collection[str]) -> str:
    """The name of the module that peft wraps: the transformers model that holds all adapters, as a run finds it."""
    holding = [name for name in classes if all(_lies_in(layer, name) for layer in adapted)]
    return min(holding, key=len) if holding else _common(base, adapted)


def _common(base: Fingerprint, adapted: Container[str]) -> str:
    """The one module that holds all frozen parameters, as the model of a LightningModule; empty if there is none."""
    first = {name.partition(".")[0] for name in base}
    common = first.pop() if len(first) == 1 else ""
    return "" if common in adapted else common  # an adapted layer is not around the adapted layers


def _lies_in(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _relative(name: str, prefix: str) -> str:
    if not _lies_in(name, prefix):
        raise ValueError(f"`{name}` is adapted and lies outside of `inner={prefix!r}`: name a module that holds it.")
    return name.removeprefix(f"{prefix}.") if prefix else name
