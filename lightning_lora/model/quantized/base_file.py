"""The weights in full precision of a quantized base, in a file that the user names.

They are read one layer at a time. What this model's layers hold must be what quantizing them gives: a file of another
model, or of another fine-tune of it, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.files.renaming import OWN_NAMES, Renaming, renamings
from lightning_lora.files.safetensors import StoredTensor, dtype_of, value_of
from lightning_lora.files.torch_files import checked
from lightning_lora.files.weights import INDEX, TORCH_INDEX, open_weights, torch_files_in
from lightning_lora.foreign import CONV1D, SOURCE_CLASS
from lightning_lora.layers.base import parameter_of
from lightning_lora.layers.quantized.formats import dequantized, matrix_shape, quantized_modules
from lightning_lora.layers.quantized.requantize import limit_of, quantized_again
from lightning_lora.model.file_values import agree
from lightning_lora.model.state import frozen_names
from lightning_lora.names import clean, join, named_parameters, nearest

RUN = "lightning_lora"  # the entry of a checkpoint that a run with adapters wrote
FULL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMED = 3  # parameters that a warning names


@dataclass(frozen=True)
class BaseFile:
    """The tensors of a model in full precision.

    Args:
        path: of the file or directory.
        tensors: by name; those in safetensors files are not read yet.
        called: what a module of the quantized model is called there.
    """

    path: str
    tensors: Mapping[str, Tensor | StoredTensor]
    called: Renaming

    def weight(self, name: str, layer: nn.Module) -> Tensor:
        """The weight of the quantized ``layer`` in full precision, ``(out_features, in_features)``, on its device.

        Raises:
            ValueError: if quantizing it does not give what the layer has.
        """
        stored = self.tensors[join(self.called(name), "weight")]
        value = stored.read() if isinstance(stored, StoredTensor) else stored.detach().clone()  # of a mapped file
        value = (value.T.contiguous() if is_transposed(layer) else value).to(parameter_of(layer).device)
        self._check_values(join(name, "weight"), value, layer)
        return value

    def bias(self, name: str, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """The frozen ``bias`` of the quantized layer ``name`` as the file has it; itself where that is another one.

        Args:
            name: of the layer.
            bias: of the layer, which its first call may have cast to the dtype in which it computes.
            dtype: in which it was loaded.
        """
        stored = self.tensors.get(join(self.called(name), "bias"))
        if stored is None:
            return bias
        value = value_of(stored)
        if not agree(value, _coarser(bias, dtype)):
            return bias
        return value.to(bias.device, copy=True)  # of a mapped file

    def _check_values(self, name: str, value: Tensor, layer: nn.Module) -> None:
        present = dequantized(layer).float()
        distance = float((quantized_again(layer, value).float() - present).norm() / present.norm().clamp_min(1e-30))
        if not distance <= limit_of(layer):
            raise ValueError(
                f"`{name}` of {self.path} is not what this base was quantized from: quantized, it is {distance:.1%} "
                f"away, where rounding explains {limit_of(layer):.0%}. Name the file of the model that was quantized, "
                "or merge into the dequantized base."
            )


def open_base(path: str, model: nn.Module) -> BaseFile:
    """Find every quantized layer of ``model`` in the file or directory at ``path``, by name and shape.

    Args:
        path: a ``.safetensors`` file, an index, a directory that ``save_pretrained`` wrote, also with
            ``pytorch_model.bin``, or a file that ``torch.save`` wrote of a state dict, or of a checkpoint with one.
        model: with quantized layers.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if the file is damaged, lacks a layer, or has one of another shape or a quantized one.
    """
    tensors = _tensors_at(Path(path))
    layers = dict(quantized_modules(model))
    names = list(layers)

    def fits(way: Renaming) -> bool:
        return all(join(way(name), "weight") in tensors for name in names)

    fitting = renamings(names, tensors, fits, max(name.count(".") for name in names))
    if not fitting:
        raise ValueError(_why_nothing_fits(path, tensors, names))
    if len(fitting) > 1:
        raise ValueError(
            f"{path} has the layers of this model at {' and at '.join(f'`{start}`' for start, _ in fitting[:2])}. Name "
            "a file with one of them alone."
        )
    base = BaseFile(path, tensors, fitting[0][1])
    for name, layer in layers.items():
        _check_shape(base, name, layer)
    return base


def _tensors_at(path: Path) -> Mapping[str, Tensor | StoredTensor]:
    path = path.parent if path.name.endswith((INDEX, TORCH_INDEX)) else path
    if not path.exists():
        raise FileNotFoundError(
            f"`{path}` does not exist: give a file or a directory with the base. For a name of the Hugging Face Hub "
            "give the directory that huggingface_hub.snapshot_download(name) returns."
        )
    files = torch_files_in(path) if path.is_dir() else [path]
    if not files or path.suffix == ".safetensors":
        return open_weights(path).tensors
    return {name: value for file in files for name, value in _torch_tensors(file).items()}


def _torch_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of ``torch.save``, mapped into memory."""
    content = _torch_content(path)
    if isinstance(content, dict) and RUN in content:
        raise ValueError(f"{path} holds adapters of a run, and no base in full precision: name the file of the base.")
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {clean(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _torch_content(path: Path) -> Any:
    try:
        return checked(path, True, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}). Name a safetensors file, a directory "
            "with one, or a file of torch.save; of a checkpoint with other objects save the `state_dict` alone."
        ) from error


def _why_nothing_fits(path: str, tensors: Mapping[str, Any], names: list[str]) -> str:
    tails = {key.split(".", 1)[-1] for key in tensors} | set(tensors)
    missing = next((name for name in names if not any(key.endswith(f"{name}.weight") for key in tails)), names[0])
    return (
        f"{path} has no tensor `{join(missing, 'weight')}` for a quantized layer of this model. The nearest names are "
        f"{', '.join(nearest(join(missing, 'weight'), tensors))}. Name the file of the model that was quantized. "
        f"{OWN_NAMES}"
    )


def _check_shape(base: BaseFile, name: str, layer: nn.Module) -> None:
    key = join(base.called(name), "weight")
    stored: Any = base.tensors[key]
    dtype = dtype_of(stored)
    if dtype not in FULL:
        raise ValueError(f"`{key}` of {base.path} is of {dtype}: it is quantized too. Name a file in full precision.")
    expected = matrix_shape(layer)
    expected = expected[::-1] if is_transposed(layer) else expected
    if tuple(stored.shape) != expected:
        raise ValueError(
            f"`{key}` of {base.path} has shape {tuple(stored.shape)}, and this model's layer has {expected}. Name the "
            "file of the model that was quantized."
        )


def is_transposed(layer: nn.Module) -> bool:
    """Whether ``layer`` stands for Hugging Face's ``Conv1D``, which stores ``(in_features, out_features)``."""
    return getattr(getattr(layer, SOURCE_CLASS, None), "__name__", "") == CONV1D


def check_samples(base: BaseFile, model: nn.Module) -> None:
    """Compare the values of the first and the last quantized layer of ``model``: a check that takes no time.

    Raises:
        ValueError: if the file is another model's.
    """
    layers = quantized_modules(model)
    for name, layer in dict((layers[0], layers[-1])).items():
        base.weight(name, layer)


def differences_elsewhere(base: BaseFile, model: nn.Module, dtype: torch.dtype) -> str | None:
    """A sentence about the frozen parameters that are not quantized, and differ from the file's or are not in it.

    Args:
        base: the file.
        model: with quantized layers.
        dtype: of its other layers. A bias of a quantized layer was loaded in it; the first call casts it to the dtype
            in which the layer computes.
    """
    frozen = frozen_names(model)
    layers = [layer for _, layer in quantized_modules(model)]
    quantized = {id(parameter_of(layer)) for layer in layers}
    biases = {id(layer._parameters["bias"]) for layer in layers}
    others = []
    for name, parameter in named_parameters(model):
        if name not in frozen or id(parameter) in quantized:
            continue
        module, _, key = name.rpartition(".")
        stored = base.tensors.get(join(base.called(module), key))
        if stored is None:
            others.append(f"`{name}` (not in the file)")
            continue
        expected = value_of(stored)
        present = _coarser(parameter, dtype) if id(parameter) in biases else parameter
        if not agree(expected, present):
            others.append(f"`{name}`")
    if not others:
        return None
    return (
        f"Of the parameters that are not quantized, {len(others)} differ from {base.path}, and stay as the model has "
        f"them: {', '.join(others[:NAMED])}{' and more' if len(others) > NAMED else ''}."
    )


def _coarser(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype`` if that has fewer digits: the file's value was rounded to it when it was loaded."""
    return value.to(dtype) if torch.finfo(dtype).eps > torch.finfo(value.dtype).eps else value
