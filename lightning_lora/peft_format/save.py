"""The adapter of a model as a PEFT directory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, distributed, nn

from lightning_lora import names
from lightning_lora.config import LoRAConfig
from lightning_lora.files.atomic import write_together
from lightning_lora.files.safetensors_writing import write_tensors
from lightning_lora.layers.registry import is_linear, original_class
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.model.record import config_of, configs_of, records
from lightning_lora.model.several.one_adapter import check_name
from lightning_lora.model.several.strengths import strengths_of
from lightning_lora.model.state import has_adapters
from lightning_lora.peft_format.config_writer import Scaled, written_config
from lightning_lora.peft_format.contents import Contents, check_contents, contents_of
from lightning_lora.peft_format.directories import places_for
from lightning_lora.peft_format.inner import belongings_of, inner_of, wider_than_adapters
from lightning_lora.peft_format.provenance import ADAPTER_CONFIG, base_of, header
from lightning_lora.peft_format.stored import CONFIG, WEIGHTS
from lightning_lora.peft_format.targets import exact_targets
from lightning_lora.peft_format.task import auto_classes, base_name
from lightning_lora.peft_format.vllm import for_vllm

FLAVORS = ("peft", "vllm")


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    inner: str | None = None,
    flavor: str = "peft",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter of ``model`` as a directory that ``PeftModel.from_pretrained(base, directory)`` loads.

    Of several adapters each goes into the sub-directory of its name. What trains in addition acts with every adapter,
    so each directory holds it; strengths that are not 1 go into the header, for :func:`load_adapter`. peft's outputs
    are then those of ``model``, with several adapters under ``use_adapters``. Slices of a fused layer become one pair
    on all of it, whose rank is the sum of theirs; so do q, k and v of an ``nn.MultiheadAttention``. peft 0.21 adds the
    update of its ``out_proj`` twice, so half of it is written, and a warning says so. Everything is checked before
    anything is written, and an error leaves the old files in all directories. In distributed training all processes
    must call it, and the first writes.

    Args:
        model: a model with adapters, live or merged.
        directory: where to write; it is created if it does not exist.
        name: of the one adapter to write, into ``directory`` itself. ``None`` writes all.
        inner: name of the module in ``model`` that peft will wrap, ``""`` for ``model`` itself. ``None`` finds it: the
            transformers model that holds all that is saved, else the one child of a LightningModule that does, else
            ``model``; a warning says so if a smaller part holds all adapters.
        flavor: ``"peft"``, or ``"vllm"`` for one rank and one scale in all layers.
        metadata: strings to keep in the header of the weights' file, such as the step and metrics.

    Raises:
        ValueError: if ``model`` has no adapters or none of this name, or has some that the format cannot hold, or
            several are to be written where ``directory`` itself holds an adapter.
        TypeError: if ``metadata`` holds anything but strings.

    Source: peft 0.21, https://huggingface.co/docs/peft/developer_guides/checkpoint

    Example:
        >>> import tempfile
        >>> from lightning_lora import LoRAConfig, apply_lora
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = apply_lora(model, LoRAConfig(r=2, targets="all"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(model, directory, metadata={"step": "100"})
        ...     sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    directory = Path(directory)
    if flavor not in FLAVORS:
        raise ValueError(f"`flavor` must be one of {', '.join(map(repr, FLAVORS))}, but got {flavor!r}.")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must be a directory, but `{directory}` is a file.")
    every = _names_to_save(model, name)
    places = places_for(every, directory, name)
    held = belongings_of(model)
    prefix, part = inner_of(model, inner, held)
    base = base_of(part)
    strengths = strengths_of(model) if len(every) > 1 else {}
    files = {}
    for each in every:  # no comprehension, whose frame would be in the way of warnings
        files[places[each]] = _files(model, each, prefix, part, base, flavor, metadata, strengths.get(each, 1.0))
    if inner is None and (to_know := wider_than_adapters(model, held)) is not None:
        warnings.warn(to_know, stacklevel=2)
    _first_of_all(lambda: write_together(files))


def _names_to_save(model: nn.Module, name: str | None) -> list[str]:
    check_is_lora(model)
    if not has_adapters(model):
        raise ValueError("The model has no adapters, so there is nothing to save: call `apply_lora` first.")
    if name is None:
        return list(configs_of(model))
    check_name(model, name)
    return [name]


def _files(
    model: nn.Module,
    name: str,
    prefix: str,
    part: nn.Module,
    base: Fingerprint,
    flavor: str,
    metadata: Mapping[str, str] | None,
    strength: float,
) -> dict[str, Callable[[Path], object]]:
    """What writes the files of the adapter ``name``."""
    holder, config = _adapted_as(model, name)
    contents = contents_of(part, config, _asked_as(prefix, holder))
    contents = for_vllm(contents) if flavor == "vllm" else contents
    text, tensors = _config_text(contents, part, config, flavor), contents.tensors()
    return file_writers(text, tensors, header(config, base, tensors, metadata, prefix, strength))


def file_writers(
    text: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> dict[str, Callable[[Path], object]]:
    """What writes the two files of a directory, by the file's name.

    Args:
        text: the configuration. It is in the header of the weights too, so that a reader knows which belong together.
        tensors: the weights, on the CPU.
        about: strings for their header.
    """
    about = {**about, ADAPTER_CONFIG: text}
    return {
        CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        WEIGHTS: lambda path: write_tensors(path, tensors, about),
    }


def _first_of_all(write: Callable[[], None]) -> None:
    """Write in the first process; the others wait."""
    several = distributed.is_available() and distributed.is_initialized()
    try:
        if not several or distributed.get_rank() == 0:
            write()
    finally:
        if several:
            distributed.barrier()


def check_is_lora(model: nn.Module) -> None:
    """Raise if ``model`` is adapted by another method than LoRA.

    Raises:
        ValueError: naming the method.
    """
    config = config_of(model)
    if config is not None and not isinstance(config, LoRAConfig):
        raise ValueError(
            f"The model is adapted by {type(config).__name__}, and PEFT's LoRA format has no place for that. The "
            "checkpoints of a run hold what trains: `load_from_checkpoint` reads them."
        )


def _adapted_as(model: nn.Module, name: str) -> tuple[str, LoRAConfig]:
    """The name of the module in ``model`` that got the adapter ``name``, empty for itself, and its configuration."""
    configured = [(holder, config) for holder, _, record in records(model) if (config := record.configs.get(name))]
    if len(configured) != 1:
        what = "several parts of it were" if configured else "a module around it was"
        raise ValueError(f"`model` was not adapted as one: {what}. Save what `apply_lora` was called with.")
    holder, config = configured[0]
    assert isinstance(config, LoRAConfig)
    return holder, config


def check_saveable(model: nn.Module) -> str | None:
    """Raise before a training what :func:`save_adapter` would raise after it, whatever the values are.

    Returns:
        What to know about the directory, where there is something.

    Raises:
        ValueError: naming what the format has no place for.
    """
    every = _names_to_save(model, None)
    held = belongings_of(model)
    prefix, part = inner_of(model, None, held)
    for name in every:
        holder, config = _adapted_as(model, name)
        check_contents(part, config, _asked_as(prefix, holder))
    return wider_than_adapters(model, held)


def _asked_as(prefix: str, holder: str) -> Callable[[str], str]:
    return lambda name: names.join(prefix, name).removeprefix(f"{holder}.")


def _config_text(contents: Contents, part: nn.Module, config: LoRAConfig, flavor: str) -> str:
    rslora = config.rslora and flavor == "peft"
    modules = {name: Scaled(pair.r, pair.alpha(rslora)) for name, pair in contents.adapted().items()}
    inside = dict(names.named_modules(part))
    linear = [module for name in modules if is_linear(module := inside[name])]
    return written_config(
        modules,
        exact_targets(list(modules), part),
        contents.modules_to_save,
        config if rslora == config.rslora else LoRAConfig(dropout=config.dropout, bias=config.bias),
        base=base_name(part),
        transposed=bool(linear) and not any(issubclass(original_class(module), nn.Linear) for module in linear),
        auto=auto_classes(part, contents.modules_to_save),
    )
