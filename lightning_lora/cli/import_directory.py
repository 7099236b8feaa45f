"""A PEFT directory to a checkpoint of a run: from files to files, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lightning_lora.cli.convert import Exported
from lightning_lora.cli.output import check_free
from lightning_lora.config import LoRAConfig, RunConfig
from lightning_lora.files.json_files import parse_object, printable
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.names import join
from lightning_lora.peft_format.directories import check_is_one
from lightning_lora.peft_format.provenance import OWN, base_in
from lightning_lora.peft_format.stored import StoredAdapter, open_adapter
from lightning_lora.trainer.checkpointing import checks, contents


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
    check_is_one(directory)
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
