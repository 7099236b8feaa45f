"""A run's checkpoint to a PEFT directory, and back: from files to files, without the model.

A checkpoint records the shapes of the base and the kind of each adapted layer in PEFT's format. What needs more than
that goes through the module: ``save_adapter(load_from_checkpoint(...), ...)``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.cli.meta_model import skeleton
from lightning_lora.cli.output import check_free
from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.files.atomic import write_together
from lightning_lora.files.json_files import parse_object, printable
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.names import join
from lightning_lora.peft_format.config_writer import Scaled, written_config
from lightning_lora.peft_format.layers import KINDS
from lightning_lora.peft_format.provenance import OWN, base_in, header
from lightning_lora.peft_format.save import file_writers
from lightning_lora.peft_format.stored import PREFIX, WEIGHTS, StoredAdapter, open_adapter
from lightning_lora.peft_format.targets import exact_targets
from lightning_lora.peft_format.task import BASE, CLASSES, recorded_classes
from lightning_lora.trainer.checkpointing import checks, contents, reading

THROUGH = "Export it from the module: save_adapter(load_from_checkpoint(YourModule, path), directory)."
KEYS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class Exported:
    """The written files.

    Args:
        path: the directory or checkpoint.
        inner: name of the module that the adapter's names are relative to.
        layers: names of the adapted layers, relative to it.
        nbytes: size of the file with the weights.
    """

    path: str
    inner: str
    layers: list[str]
    nbytes: int


def export_checkpoint(path: Path, directory: Path, inner: str | None = None, overwrite: bool = False) -> Exported:
    """Write the adapters in the checkpoint ``path`` of a run as a PEFT directory.

    Args:
        path: a ``.ckpt`` that a Trainer with LoRACallback wrote.
        directory: where to write.
        inner: name of the module of the LightningModule that peft will wrap; ``None``: the one that holds everything.
        overwrite: replace an adapter in ``directory``.

    Raises:
        FileExistsError: if ``directory`` has an adapter already.
        ValueError: if the file is damaged, or holds what only the module can place.
    """
    _check_is_file(path)
    check_free(directory / WEIGHTS, overwrite)
    checkpoint = reading.read(reading.on_cpu, path, True, "CKPT")
    config, base = reading.lora_facts_in(checkpoint, path, "CKPT")
    state = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    pairs = _pairs(state, config, path)
    classes = recorded_classes(checkpoint[contents.KEY].get(CLASSES))
    prefix = _wrapped(classes, base, pairs) if inner is None else inner
    named = classes.get(prefix, {})
    relative = {name: _relative(name, prefix) for name in pairs}
    below = {_relative(name, prefix): sums for name, sums in base.items() if _lies_in(name, prefix)}
    kinds = {name: _kind(name, checkpoint[contents.KEY], path) for name in pairs}
    tensors: dict[str, Tensor] = {}
    for name, both in pairs.items():
        matrices = zip(KEYS[kinds[name] == "embedding"], _shaped(both, kinds[name], _shape(name, base)), strict=True)
        tensors |= {f"{PREFIX}{relative[name]}.{key}": value for key, value in matrices}
    text = written_config(
        {relative[name]: Scaled(A.shape[0], config.alpha_for(name)) for name, (A, _) in pairs.items()},
        exact_targets(list(relative.values()), skeleton(_shapes(below))),
        [],
        config,
        base=named.get(BASE),
        transposed=set(kinds.values()) - {"embedding", "convolution"} == {"transposed"},
        auto={key: value for key, value in named.items() if key != BASE},
    )
    about = {"step": str(checkpoint.get("global_step", 0)), "epoch": str(checkpoint.get("epoch", 0))}
    write_together(directory, file_writers(text, tensors, header(config, below, tensors, about, prefix)))
    return Exported(str(directory), prefix, list(relative.values()), (directory / WEIGHTS).stat().st_size)


def _check_is_file(path: Path) -> None:
    """Raise unless there is a file at ``path`` that may be a checkpoint."""
    if not Path(path).exists():
        raise FileNotFoundError(f"`{path}` does not exist: give the .ckpt of a run with LoRACallback.")
    if Path(path).is_dir() or str(path).endswith(".safetensors"):
        raise ValueError(
            f"`{path}` is no checkpoint: CKPT must be the .ckpt of a run with LoRACallback. A PEFT directory and its "
            "safetensors file need no export; `lightning-lora inspect PATH` shows them."
        )


def import_directory(directory: Path, path: Path, inner: str | None = None, overwrite: bool = False) -> Exported:
    """Write a PEFT directory of ours as a checkpoint: for ``ckpt_path`` in ``test``, and for ``load_from_checkpoint``.

    It has no state of an optimizer, so ``fit`` cannot continue from it: ``LoRACallback(init_from=directory)`` starts
    from the directory itself, and does from one that peft wrote.

    Args:
        directory: one that :func:`~lightning_lora.save_adapter`, ``export`` or a run wrote.
        path: where to write.
        inner: name of the module that the directory's names are relative to; ``None``: the recorded one.
        overwrite: replace what is at ``path``.

    Raises:
        FileExistsError: if there is something at ``path``.
        ValueError: if the directory is damaged, or does not record its base and configuration.
    """
    if directory.is_file():
        raise ValueError(
            f"`{directory}` is a file, and DIR must be a PEFT directory. A checkpoint needs no import; `lightning-lora "
            "export CKPT DIR` makes a PEFT directory of one."
        )
    check_free(path, overwrite)
    adapter = open_adapter(directory)
    metadata = adapter.file.metadata
    if not {f"{OWN}.config", f"{OWN}.base"} <= metadata.keys():
        raise ValueError(
            f"`{directory}` does not record its base and configuration, as peft's own do not: start from it by "
            "LoRACallback(init_from=...), or load it by load_adapter(model, directory)."
        )
    config, prefix = _config_in(metadata, directory), metadata.get(f"{OWN}.inner", "") if inner is None else inner
    base = {join(prefix, name): sums for name, sums in base_in(metadata).items()}
    state = _state(adapter, prefix, config)
    written = {
        "state_dict": state,
        "epoch": _number(metadata.get("epoch")),
        "global_step": _number(metadata.get("step")),
        "pytorch-lightning_version": version("lightning"),
        contents.KEY: {
            **contents.facts(LoRAMethod(config), RunConfig(), base, {}, {}),
            checks.ENTRIES: sorted(state),
        },
    }
    contents.write_checkpoint(written, path)
    layers = sorted({key.partition(".lora.")[0] for key in state})
    return Exported(str(path), prefix, layers, path.stat().st_size)


def _pairs(state: Mapping[str, Tensor], config: LoRAConfig, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of their layer."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(rf"(.+)\.lora\.{config.name}\.([AB])", key)
        if match is None or value.dim() != 2:
            what = "a slice or a stack of a layer" if ".lora." in key else "trained in addition to the adapters"
            raise ValueError(f"`{path}` holds `{key}`, {what}, which only the module can place. {THROUGH}")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"`{path}`: `{key}` must hold finite numbers: its training failed, or it is damaged.")
        halves.setdefault(match[1], {})[match[2]] = value
    for name, pair in halves.items():
        if set(pair) != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise ValueError(f"`{path}` is damaged: A and B of `{name}` do not fit.")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _shapes(base: Fingerprint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(size for size in sums[3:] if size is not None) for name, sums in base.items()}


def _shape(name: str, base: Fingerprint) -> tuple[int, ...]:
    return _shapes(base).get(f"{name}.weight", ())


def _kind(name: str, facts: Mapping[str, Any], path: Path) -> str:
    """The kind of the layer, as the run recorded it.

    Raises:
        ValueError: if PEFT's format has no place for it, or the file does not record it.
    """
    kinds = facts.get("kinds")
    kind = kinds.get(name) if isinstance(kinds, dict) else None
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


def _config_in(metadata: Mapping[str, str], directory: Path) -> LoRAConfig:
    try:
        return LoRAConfig.from_file(parse_object(metadata[f"{OWN}.config"].encode()))
    except (ValueError, TypeError) as error:
        reason = printable(str(error))
        raise ValueError(
            f"`{directory}` does not record its configuration ({reason}): it is damaged, or of a later version."
        ) from error


def _state(adapter: StoredAdapter, prefix: str, config: LoRAConfig) -> dict[str, Tensor]:
    """The pairs under the keys of a checkpoint."""
    for key in (*adapter.in_full, *(name for name, pair in adapter.pairs.items() if pair.times > 1)):
        raise ValueError(
            f"`{adapter.path}` holds more than pairs of plain layers: only the module can place `{key}`. Load it by "
            "load_adapter(model, directory), or LoRACallback(init_from=...)."
        )
    return {
        join(prefix, f"{name}.lora.{config.name}.{letter}"): tensor.read_finite()
        for name, pair in adapter.pairs.items()
        for letter, tensor in (("A", pair.A), ("B", pair.B))
    }


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
