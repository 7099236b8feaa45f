"""Directories of several adapters: each adapter has the sub-directory of its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_lora.names import nearest
from lightning_lora.peft_format.stored import CONFIG, PICKLED, WEIGHTS


def places_for(names: Sequence[str], directory: Path, name: str | None) -> dict[str, Path]:
    """Where each of the adapters ``names`` is written.

    Args:
        names: of the adapters to write.
        directory: that the user gave.
        name: that the user gave; ``None`` for all.

    Raises:
        ValueError: if several are to be written and ``directory`` itself holds an adapter.
    """
    if len(names) == 1:
        return {names[0]: directory}
    if is_adapter_directory(directory):
        raise ValueError(
            f"`{directory}` holds an adapter itself, which would be read in place of those in its sub-directories "
            f"{', '.join(map(repr, names))}. Choose another directory, or move that adapter away."
        )
    return {each: directory / each for each in names}


def is_adapter_directory(directory: Path) -> bool:
    """Whether ``directory`` itself holds files of an adapter."""
    return any((directory / file).is_file() for file in (CONFIG, WEIGHTS, PICKLED))


def directories_in(directory: Path) -> dict[str, Path]:
    """The sub-directories of ``directory`` that hold adapters, by their names, where it holds none itself."""
    if is_adapter_directory(directory):
        return {}
    return {path.name: path for path in sorted(directory.iterdir()) if path.is_dir() and is_adapter_directory(path)}


def check_is_one(directory: Path) -> None:
    """Raise if ``directory`` holds several adapters in sub-directories, where one is needed.

    Raises:
        ValueError: naming them.
    """
    if not directory.is_dir() or any(directory.glob("*.safetensors")):  # a file, one adapter, or a model
        return
    several = directories_in(directory)
    if several:
        raise ValueError(
            f"`{directory}` holds the adapters {', '.join(several)} in sub-directories, and this takes one at a time. "
            f"Give the sub-directory, such as `{next(iter(several.values()))}`."
        )


def check_are_names(directories: Mapping[str, Path], directory: Path) -> None:
    """Raise unless the names of the sub-directories of ``directory`` that hold adapters can be those of adapters.

    Raises:
        ValueError: naming the first that is not.
    """
    other = next((name for name in directories if not name.isidentifier()), None)
    if other is not None:
        raise ValueError(
            f"`{directory}` holds no adapter itself, and the name of its sub-directory {other!r} is no Python "
            f"identifier, as names of adapters are. Give the directory of one adapter, such as `{directory / other}`."
        )


def directory_of(directory: Path, name: str) -> Path:
    """Where the adapter ``name`` is in ``directory``, which holds several.

    Raises:
        ValueError: naming the nearest, if there is none of that name.
    """
    present = directories_in(directory)
    if name not in present:
        close = ", ".join(f"`{each}`" for each in nearest(name, list(present)))
        raise ValueError(f"`name` must be that of a sub-directory of `{directory}`, but got {name!r}. It has {close}.")
    return present[name]
