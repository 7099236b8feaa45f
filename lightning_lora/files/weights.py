"""The weights of a model in safetensors files: one file, or several with an index, as transformers writes them.

Nothing but headers is read here; tensors are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_lora.files.json_files import read_object
from lightning_lora.files.safetensors import StoredTensor, TensorFile, open_tensors
from lightning_lora.names import nearest

INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Args:
        path: the file, or the directory.
        files: the safetensors files in it.
        tensors: every tensor by name.
        config: what ``config.json`` beside them holds, else nothing.
        index: the index of several files.
    """

    path: Path
    files: list[TensorFile]
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    index: Path | None = None

    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def open_weights(path: Path) -> Weights:
    """Find the safetensors files at ``path`` and read their headers.

    Args:
        path: a ``.safetensors`` file, or a directory with one, or with several and their index.

    Raises:
        FileNotFoundError: if there is nothing at ``path``, or no safetensors file.
        ValueError: if a file is damaged, or the index names files outside the directory or tensors that they lack.
    """
    if path.is_file():
        files, index = [open_tensors(path)], None
        folder = path.parent
    elif path.is_dir():
        index, folder = _index_in(path), path
        files = [open_tensors(file) for file in (_shards(index) if index else [_only_file(path)])]
    else:
        raise FileNotFoundError(f"`{path}` does not exist: give a .safetensors file or a directory with one.")
    tensors = _together(files)
    if index is not None:
        _check_map(index, tensors)
    config = folder / "config.json"
    return Weights(path, files, tensors, read_object(config) if config.is_file() else {}, index)


def _index_in(folder: Path) -> Path | None:
    indices = sorted(folder.glob(f"*{INDEX}"))
    if not indices or (folder / "model.safetensors").is_file():
        return None
    if len(indices) > 1:
        raise ValueError(f"`{folder}` has {len(indices)} indices of safetensors files: keep the one that is meant.")
    return indices[0]


def _only_file(folder: Path) -> Path:
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    named = [file for file in files if file.name == "model.safetensors"]
    if not files:
        raise FileNotFoundError(
            f"`{folder}` has no .safetensors file with a model's weights. Other formats are not read, as they can run "
            "code: save the model with `save_pretrained`, which writes safetensors."
        )
    if len(files) > 1 and not named:
        raise ValueError(
            f"`{folder}` has {len(files)} safetensors files and no `*{INDEX}`: give the file that is meant."
        )
    return (named or files)[0]


def _shards(index: Path) -> list[Path]:
    """The files that ``index`` names: plain names of files beside it, whatever it says."""
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"`{index}` names the file {name!r}, but may name only .safetensors files that lie beside it."
            )
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"`{index}` names {name!r}, which is not there: fetch the missing file.")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"`{index}` must have a `weight_map` from the names of tensors to those of files.")
    return found


def _check_map(index: Path, tensors: dict[str, StoredTensor]) -> None:
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].path.name != file:
            raise ValueError(
                f"`{index}` says that {file!r} holds `{name}`, which it does not: the files do not belong "
                "together. Fetch them again."
            )


def _together(files: Iterable[TensorFile]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in found:
                raise ValueError(f"`{name}` is in {found[name].path.name} and in {file.path.name}: which is meant?")
            found[name] = tensor
    return found


def keeps_transposed(name: str, weights: Weights, otherwise: bool) -> bool | None:
    """Whether the square map ``name`` is kept as ``(in_features, out_features)``, as GPT-2's are.

    The lengths of biases tell it for maps that are not square: the nearest of those by name count. A map without a
    bias is an ``nn.Linear``, as the turned ones of transformers all have one.

    Args:
        name: of the map.
        weights: the model's.
        otherwise: what it is where no bias in the model tells.

    Returns:
        ``None`` where the nearest say both.
    """
    if f"{name}.bias" not in weights.tensors:
        return False
    sides = _sides(weights)
    if not sides:
        return otherwise
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        near = {side for other, side in sides.items() if other.split(".")[:depth] == parts[:depth]}
        if near:
            return near == {1} if len(near) == 1 else None
    return None


def all_transposed(weights: Weights) -> bool:
    """Whether the biases tell of turned maps and of no others."""
    return set(_sides(weights).values()) == {1}


def _sides(weights: Weights) -> dict[str, int]:
    """Which side of each weight that is not square is as long as its bias."""
    found: dict[str, int] = {}
    for key, tensor in weights.tensors.items():
        name = key.removesuffix(".weight")
        bias = weights.tensors.get(f"{name}.bias")
        if key.endswith(".weight") and bias is not None and len(set(tensor.shape)) == len(tensor.shape) == 2:
            found.update((name, side) for side in (0, 1) if bias.shape == tensor.shape[side : side + 1])
    return found


def no_such(name: str, weights: Weights) -> str:
    """Words for a tensor that is not there, with the names that are most like it."""
    return (
        f"`{weights.path}` has no tensor `{name}`. The nearest names are {', '.join(nearest(name, weights.tensors))}."
    )
