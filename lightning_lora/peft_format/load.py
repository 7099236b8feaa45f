"""PEFT directories into a model: all of a directory, or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import is_adapted
from lightning_lora.model import record
from lightning_lora.model.apply import adapt
from lightning_lora.model.journal import Journal, all_or_nothing, complete_undo
from lightning_lora.model.loading import load
from lightning_lora.model.same_config import check_method
from lightning_lora.peft_format.contents import holders
from lightning_lora.peft_format.placement import (
    FileValues,
    check_adapted,
    check_targets,
    config_for,
    filled,
    read_values,
    values_for,
    with_attentions,
)
from lightning_lora.peft_format.provenance import check_base
from lightning_lora.peft_format.stored import config_of, open_adapter
from lightning_lora.peft_format.targets import inner_name


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    inner: str | None = None,
    strict_base: bool = True,
) -> list[str]:
    """Load a directory that peft or :func:`save_adapter` wrote into ``model``: all of it, or nothing at all.

    A model without adapters gets them as ``adapter_config.json`` says, with one pair on all of a fused layer; q, k and
    v of an ``nn.MultiheadAttention`` get a pair each, and its ``out_proj`` twice the stored update, as in peft. A model
    with adapters keeps its own configuration, which must fit: apply yours first to continue to train slices.
    Nothing is unpickled.

    Args:
        model: any module, bare or adapted.
        directory: where the two files are.
        inner: name of the module in ``model`` that peft would wrap, ``""`` for ``model`` itself; ``None`` finds it.
        strict_base: another base than the one that the header records is an error; ``False`` makes it a warning.

    Returns:
        The names of the adapted modules.

    Raises:
        ValueError: if a file is damaged, holds more than plain LoRA, or does not fit ``model``; nothing is changed.
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
    if directory.is_file():
        raise ValueError(
            f"`directory` must be a directory in PEFT's format, but `{directory}` is a file. A checkpoint of a run is "
            "loaded by load_from_checkpoint(cls, path) or LoRACallback(init_from=path); the command `lightning-lora "
            "export CKPT DIR` makes a directory of it."
        )
    if not directory.is_dir():
        raise FileNotFoundError(f"`directory` must be a local directory, but there is no `{directory}`.")
    adapter = open_adapter(directory)
    asked, file = config_of(adapter), read_values(adapter)
    complete_undo(model)
    if record.is_merged(model):
        raise ValueError("The model has merged adapters: call `unmerge_lora(model)`, or `remove_lora(model)`, first.")
    check_method(model, LoRAConfig())
    prefix = inner_name(model, inner, lambda head: _has_all(model, head, file))
    part = dict(names.named_modules(model))[prefix]
    check_targets(asked, file, part)
    file = with_attentions(file, part)
    check_base(adapter.file.metadata, part, set(file.in_full), strict_base)
    if is_adapted(model):
        check_adapted(file, part)
        all_or_nothing(model, lambda journal: _load(model, part, prefix, file, journal, bare=False))
    else:
        config = config_for(asked, file, part, prefix, model)
        all_or_nothing(model, lambda journal: _adapt_and_load(model, part, prefix, config, file, journal))
    return [name for name, _, _ in holders(model)]


def _has_all(model: nn.Module, head: str, file: FileValues) -> bool:
    known = {name for name, _ in names.named_modules(model)}
    return all(names.join(head, name) in known for name in file.pairs)


def _adapt_and_load(
    model: nn.Module,
    part: nn.Module,
    prefix: str,
    config: LoRAConfig,
    file: FileValues,
    journal: Journal,
) -> None:
    adapt(model, config, journal)
    check_adapted(file, part)
    _load(model, part, prefix, file, journal, bare=True)


def _load(
    model: nn.Module,
    part: nn.Module,
    prefix: str,
    file: FileValues,
    journal: Journal,
    *,
    bare: bool,
) -> None:
    config = record.config_of(model)
    assert config is not None
    values = values_for(file, part, config.name)
    state: dict[str, Any] = {names.join(prefix, key): value for key, value in values.items()}
    load(model, filled(state, model) if bare else state, journal)
