"""The weights of a model in safetensors files: one file, or several with an index, as transformers writes them.

Nothing but headers is read here; tensors are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_lora.files.json_files import read_object, shown
from lightning_lora.files.safetensors import StoredTensor, TensorFile, open_tensors
from lightning_lora.names import nearest

INDEX = ".safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = f"{TORCH_FILE}.index.json"


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Args:
        path: the file, or the directory.
        files: the safetensors files in it.
        tensors: every tensor by name.
        config: the content of ``config.json`` in the same folder; empty if there is none.
        index: the index of several files.
    """

    path: Path
    files: list[TensorFile]
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    index: Path | None = None

    def parameters(self) -> int:
        """Number of parameters."""
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
        files = [open_tensors(file) for file in (_shards(index, ".safetensors") if index else [_only_file(path)])]
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
        raise ValueError(f"`{folder}` has {len(indices)} indices of safetensors files: keep one of them.")
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
        raise ValueError(f"`{folder}` has {len(files)} safetensors files and no `*{INDEX}`: give one of the files.")
    return (named or files)[0]


def torch_files_in(folder: Path) -> list[Path]:
    """The files of ``torch.save`` with a model's weights, as transformers names them; none if safetensors files exist.

    Raises:
        FileNotFoundError, ValueError: if the index of several names what is not there, or not in ``folder``.
    """
    if any(not path.name.startswith("adapter_") for path in folder.glob("*.safetensors")):
        return []
    if (folder / TORCH_FILE).is_file():
        return [folder / TORCH_FILE]
    return _shards(folder / TORCH_INDEX, ".bin") if (folder / TORCH_INDEX).is_file() else []


def _shards(index: Path, suffix: str) -> list[Path]:
    """The files that ``index`` names; a name that leads out of its folder is refused."""
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(suffix):
            raise ValueError(
                f"`{index}` names the file {shown(name)}, but may name only {suffix} files in its own folder."
            )
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"`{index}` names {shown(name)}, which is not there: fetch the missing file.")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"`{index}` must have a `weight_map` from the names of tensors to those of files.")
    return weight_map


def _check_map(index: Path, tensors: dict[str, StoredTensor]) -> None:
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].path.name != file:
            raise ValueError(
                f"`{index}` says that {shown(file)} holds {shown(name)}, which it does not: the files do not belong "
                "together. Fetch them again."
            )


def _together(files: Iterable[TensorFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise ValueError(
                    f"`{name}` is in {tensors[name].path.name} and in {file.path.name}: keep one of the two."
                )
            tensors[name] = tensor
    return tensors


def keeps_transposed(name: str, weights: Weights, default: bool) -> bool | None:
    """Whether the square weight of the layer ``name`` has the shape ``(in_features, out_features)``, as GPT-2's have.

    Where a weight is not square, the length of the bias shows which side is which. The layers of this kind that are
    nearest by name decide. A layer without a bias is an ``nn.Linear``, as transformers' Conv1D always has a bias.

    Args:
        name: of the layer.
        weights: the weights of the model.
        default: the answer if no bias in the model decides.

    Returns:
        ``None`` if the nearest layers contradict each other.
    """
    if f"{name}.bias" not in weights.tensors:
        return False
    sides = _sides(weights)
    if not sides:
        return default
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        near = {side for neighbour, side in sides.items() if neighbour.split(".")[:depth] == parts[:depth]}
        if near:
            return near == {1} if len(near) == 1 else None
    return None


def all_transposed(weights: Weights) -> bool:
    """Whether every bias shows that its weight has the shape ``(in_features, out_features)``."""
    return set(_sides(weights).values()) == {1}


def _sides(weights: Weights) -> dict[str, int]:
    """Which side of each weight that is not square has the length of its bias, by the layer's name."""
    sides: dict[str, int] = {}
    for key, tensor in weights.tensors.items():
        name = key.removesuffix(".weight")
        bias = weights.tensors.get(f"{name}.bias")
        if key.endswith(".weight") and bias is not None and len(set(tensor.shape)) == len(tensor.shape) == 2:
            sides.update((name, side) for side in (0, 1) if bias.shape == tensor.shape[side : side + 1])
    return sides


def no_such(name: str, weights: Weights) -> str:
    """The message for a missing tensor, with the names that are most like it."""
    return (
        f"`{weights.path}` has no tensor `{name}`. The nearest names are {', '.join(nearest(name, weights.tensors))}."
    )
