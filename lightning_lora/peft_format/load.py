"""PEFT directories into a model: all of a directory, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.files.safetensors import open_tensors
from lightning_lora.model import record
from lightning_lora.model.apply import adapt
from lightning_lora.model.fingerprint import Fingerprint, fingerprint
from lightning_lora.model.journal import Journal, all_or_nothing, complete_undo
from lightning_lora.model.loading import load, load_part
from lightning_lora.model.same_config import check_method
from lightning_lora.model.several.one_adapter import check_name
from lightning_lora.model.several.strengths import set_strengths
from lightning_lora.model.state import lora_state_dict
from lightning_lora.peft_format.common_values import check_common
from lightning_lora.peft_format.config import PeftConfig
from lightning_lora.peft_format.contents import holders
from lightning_lora.peft_format.directories import check_are_names, directories_in, directory_of
from lightning_lora.peft_format.placement import (
    FileValues,
    check_adapted,
    check_targets,
    config_for,
    filled,
    read_values,
    under_every_name,
    values_for,
    with_attentions,
)
from lightning_lora.peft_format.provenance import check_base, strength_in
from lightning_lora.peft_format.slot import slot_values
from lightning_lora.peft_format.stored import WEIGHTS, config_of, open_adapter
from lightning_lora.peft_format.targets import inner_name


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    into: str | None = None,
    *,
    inner: str | None = None,
    strict_base: bool = True,
) -> list[str]:
    """Load a directory that peft or :func:`save_adapter` wrote into ``model``: all of it, or nothing at all.

    A new adapter is made as ``adapter_config.json`` says, with one pair on all of a fused layer; q, k and v of an
    ``nn.MultiheadAttention`` get a pair each, and its ``out_proj`` twice the stored update, as in peft. It acts in
    addition to those that act already; :func:`use_adapters` chooses. An adapter that the model has keeps its own
    configuration, which must fit: apply yours first to continue to train slices. A directory with sub-directories of
    several adapters gives all of them, by their names, and they act as strongly as when :func:`save_adapter` wrote
    them: after :func:`combine_adapters` the combined ones rest. Nothing is unpickled.

    Args:
        model: any module, bare or adapted.
        directory: where the two files are, or sub-directories with them.
        name: of the adapter in ``model``, and of the sub-directory where there are several. ``None``: ``"default"``, or
            the only adapter that the model has.
        into: name of an adapter whose values the file's replace in place, for compiled code and CUDA graphs that are in
            use. Its rank and scale stay: the file's pairs are padded with zeros, their scale goes into B, and layers
            that the file does not adapt get zeros.
        inner: name of the module in ``model`` that peft would wrap, ``""`` for ``model`` itself; ``None`` finds it.
        strict_base: another base than the one that the header records is an error; ``False`` makes it a warning.

    Returns:
        The names of the modules with these adapters.

    Raises:
        ValueError: if a file is damaged, holds more than plain LoRA, or does not fit ``model`` or the adapters that it
            has; nothing is changed.
        FileNotFoundError: if there is no such directory, or a file is missing.

    Source: peft 0.21, https://huggingface.co/docs/peft/developer_guides/checkpoint

    Example:
        >>> import tempfile
        >>> from lightning_lora import LoRAConfig, apply_lora, save_adapter
        >>> trained = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = model.load_state_dict(trained.state_dict())
        >>> _ = apply_lora(trained, LoRAConfig(r=2, targets="all"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(trained, directory)
        ...     load_adapter(model, directory)
        ['0', '2']
    """
    directory = Path(directory)
    _check_directory(directory)
    complete_undo(model)
    if record.is_merged(model):
        raise ValueError("The model has merged adapters: call `unmerge_lora(model)`, or `remove_lora(model)`, first.")
    check_method(model, LoRAConfig())
    places = _places(model, directory, name, into)
    strengths = _strengths(places) if len(places) > 1 else {}
    loaded = load_directories(model, places, into, inner=inner, strict_base=strict_base)
    set_strengths(model, strengths)
    return loaded


def load_directories(
    model: nn.Module,
    places: Mapping[str, Path],
    into: str | None = None,
    *,
    inner: str | None = None,
    strict_base: bool = True,
) -> list[str]:
    """As :func:`load_adapter`, of the directory of each adapter by its name in ``model``."""
    base = cache(lambda prefix: fingerprint(dict(names.named_modules(model))[prefix]))
    files = {}
    for each, place in places.items():  # no comprehension, whose frame would be in the way of warnings
        files[each] = _open(model, place, inner, strict_base, base)
    if into is None:
        all_or_nothing(model, lambda journal: _load(model, files, journal))
    else:
        all_or_nothing(model, lambda journal: _swap(model, into, files[into], journal))
    return [place for place, _, adapters in holders(model) if not adapters.keys().isdisjoint(files)]


def _strengths(places: Mapping[str, Path]) -> dict[str, float]:
    """How strongly the adapters in these directories acted together; fully, if the ones that acted are not here."""
    files = {name: place / WEIGHTS for name, place in places.items()}
    strengths = {name: strength_in(open_tensors(path).metadata) for name, path in files.items() if path.is_file()}
    return strengths if any(strengths.values()) else dict.fromkeys(strengths, 1.0)


def _check_directory(directory: Path) -> None:
    if directory.is_file():
        raise ValueError(
            f"`directory` must be a directory in PEFT's format, but `{directory}` is a file. A checkpoint of a run is "
            "loaded by load_from_checkpoint(cls, path) or LoRACallback(init_from=path); the command `lightning-lora "
            "export CKPT DIR` makes a directory of it."
        )
    if not directory.is_dir():
        raise FileNotFoundError(f"`directory` must be a local directory, but there is no `{directory}`.")


def _places(model: nn.Module, directory: Path, name: str | None, into: str | None) -> dict[str, Path]:
    """The directory of each adapter that is loaded, by its name in ``model``.

    Raises:
        ValueError: if the names do not go together with the directory and the adapters of ``model``.
    """
    if into is None:
        several = directories_in(directory)
        if several and name is None:
            check_are_names(several, directory)
            return several
        return {name or _only_name(model): directory_of(directory, name) if several and name else directory}
    if name is not None:
        raise ValueError(
            f"`into={into!r}` replaces the values of that adapter, so `name={name!r}` names nothing. Give one of them."
        )
    check_name(model, into, "into")
    if directories_in(directory):
        raise ValueError(
            f"`into` takes the directory of one adapter, but `{directory}` holds "
            f"{', '.join(f'`{each}`' for each in directories_in(directory))}. Name a sub-directory."
        )
    return {into: directory}


def _only_name(model: nn.Module) -> str:
    """The name that an adapter has where the user gives none."""
    present, default = list(record.configs_of(model)), LoRAConfig().name
    if len(present) == 1:
        return present[0]
    if present and default not in present:
        raise ValueError(
            f"The model has the adapters {', '.join(f'`{each}`' for each in present)}: give `name`, one of these to "
            "load into it, or another one to add an adapter."
        )
    return default


@dataclass(frozen=True)
class OpenFile:
    """A directory, read and checked against a model.

    Args:
        asked: its configuration.
        values: its values.
        part: the part of the model that peft would wrap.
        prefix: its name.
    """

    asked: PeftConfig
    values: FileValues
    part: nn.Module
    prefix: str

    def in_model(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``values`` under their names in the model."""
        return {names.join(self.prefix, key): value for key, value in values.items()}


def _open(
    model: nn.Module, directory: Path, inner: str | None, strict_base: bool, base: Callable[[str], Fingerprint]
) -> OpenFile:
    adapter = open_adapter(directory)
    asked, file = config_of(adapter), read_values(adapter)
    prefix = inner_name(model, inner, lambda head: _has_all(model, head, file))
    part = dict(names.named_modules(model))[prefix]
    check_targets(asked, file, part)
    file = with_attentions(file, part)
    check_base(adapter.file.metadata, lambda: base(prefix), set(file.in_full), strict_base)
    return OpenFile(asked, file, part, prefix)


def _has_all(model: nn.Module, head: str, file: FileValues) -> bool:
    known = {name for name, _ in names.named_modules(model)}
    return all(names.join(head, name) in known for name in file.pairs)


def _load(model: nn.Module, files: Mapping[str, OpenFile], journal: Journal) -> None:
    """Load ``files`` by the names of adapters, of which some may be new; the others in ``model`` stay as they are."""
    present = record.configs_of(model).keys()
    check_common({name: file.in_model(file.values.in_full) for name, file in files.items()}, model)
    state: dict[str, Any] = dict(lora_state_dict(model)) if present - files.keys() else {}
    for name, file in files.items():
        if name not in present:
            config = config_for(file.asked, file.values, file.part, file.prefix, model)
            adapt(model, replace(config, name=name), journal)
        check_adapted(file.values, file.part, name)
    for name, file in files.items():
        state |= under_every_name(file.in_model(values_for(file.values, file.part, name)), model)
    load(model, state if files.keys() <= present else filled(state, model), journal)


def _swap(model: nn.Module, into: str, file: OpenFile, journal: Journal) -> None:
    check_common({into: file.in_model(file.values.in_full)}, model, all_use_it=True)
    values = file.in_model(slot_values(file.values, file.part, into))
    load_part(model, under_every_name(values, model), journal)
