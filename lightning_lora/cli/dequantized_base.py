"""A quantized base in files as a merge with ``--dequantize`` reads it: as if all its weights were in full precision.

Each is computed where it is needed, some rows at a time. Names, shapes and dtypes are those that the same merge gives
in memory: a plain layer has the dtype of most of the parameters that are not quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.cli.quantized_weights import QuantizedWeight, Rows, is_quantized_in, quantized_weights
from lightning_lora.files.json_files import shown
from lightning_lora.files.safetensors import DTYPES, FLOATS, TORCH_DTYPES, StoredTensor, TensorFile
from lightning_lora.files.weights import Weights, open_weights
from lightning_lora.foreign import CONV1D, CONV1D_LAYERS, CONV1D_MODELS

CONFIG = "quantization_config"  # the entry of a config.json
COMPUTES_IN = "bnb_4bit_compute_dtype"


@dataclass(frozen=True)
class ComputedTensor(StoredTensor):
    """A tensor of a view, which no file holds with these numbers.

    Args:
        load: returns a function that computes some rows in fp32, or in the tensor's own dtype.
    """

    load: Callable[[], Rows]

    def slabs(self) -> Iterable[tuple[slice, Tensor]]:
        """Its rows as a matrix, some at a time and in order, not rounded to its dtype yet."""
        compute = self.load()
        for rows in self.row_slices():
            yield rows, compute(rows)

    def read(self) -> Tensor:
        """The tensor."""
        return torch.cat([values for _, values in self.slabs()]).to(self.torch_dtype()).view(self.shape)


def open_dequantized(path: Path) -> Weights:
    """The model at ``path``, with its weights in full precision: codes are no numbers to compare or to count."""
    weights = open_weights(path)
    return dequantized_base(weights) if any(is_quantized_in(name, weights) for name in weights.tensors) else weights


def dequantized_base(base: Weights) -> Weights:
    """``base`` with the matrix of each quantized weight in its place, and without what described the quantization.

    Raises:
        ValueError: if no weight of it is quantized by bitsandbytes, or one is damaged.
    """
    weights = quantized_weights(base, _computes_in(base))
    if not weights:
        raise ValueError(
            f"`--dequantize` is for a base that bitsandbytes quantized, and `{base.path}` holds no such weight. Leave "
            "it out for a base in full precision; of another library, give the base that was quantized."
        )
    left_out = {part for weight in weights for part in weight.parts}
    dtype = _plain_dtype(base, weights, left_out)
    computed = {weight.name: _matrix(weight, base, dtype) for weight in weights}
    computed |= {bias.name: _cast(bias, dtype) for bias in _biases(base, weights) if bias.dtype != dtype}
    files = [_view(file, computed, left_out) for file in base.files]
    config = {key: value for key, value in base.config.items() if key != CONFIG}
    return replace(base, files=files, tensors={k: t for file in files for k, t in file.tensors.items()}, config=config)


def _computes_in(base: Weights) -> torch.dtype:
    """The dtype in which the 4-bit layers compute, which is not in their files; fp32 where nothing says it."""
    quantization = base.config.get(CONFIG)
    name = quantization.get(COMPUTES_IN) if isinstance(quantization, dict) else None
    dtype = torch.float32 if name is None else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or DTYPES.get(dtype) not in FLOATS:
        raise ValueError(f"`{base.path}`: its config.json must have a dtype as `{COMPUTES_IN}`, but has {shown(name)}.")
    return dtype


def _plain_dtype(base: Weights, weights: list[QuantizedWeight], left_out: set[str]) -> str:
    """The name in safetensors of the dtype of the plain layers.

    It is the dtype in which transformers loads the model, or that of most of the numbers outside of quantized layers.
    """
    loaded = getattr(torch, str(base.config.get("dtype") or base.config.get("torch_dtype")), None)
    if isinstance(loaded, torch.dtype) and DTYPES.get(loaded) in FLOATS:
        return DTYPES[loaded]
    layers = {weight.name.rpartition(".")[0] for weight in weights}
    sizes: Counter[str] = Counter()
    for name, tensor in base.tensors.items():
        if tensor.dtype in FLOATS and name not in left_out and name.rpartition(".")[0] not in layers:
            sizes[tensor.dtype] += tensor.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else DTYPES[_computes_in(base)]


def _matrix(weight: QuantizedWeight, base: Weights, dtype: str) -> ComputedTensor:
    shape, load = weight.shape, weight.load
    if _is_conv1d(weight.name, base):
        shape, load = (shape[1], shape[0]), lambda: _transposed(weight)
    return _computed(base.tensors[weight.name], dtype, shape, load)


def _transposed(weight: QuantizedWeight) -> Rows:
    matrix = weight.load()(slice(0, weight.shape[0])).T
    return lambda rows: matrix[rows].contiguous()


def _is_conv1d(name: str, base: Weights) -> bool:
    """Whether the layer of ``name`` is a ``Conv1D``: its codes are of the transposed weight, and nothing there says so.

    Raises:
        ValueError: if it has the name of one, and there is no configuration.
    """
    if name.split(".")[-2:-1] not in [[layer] for layer in CONV1D_LAYERS]:
        return False
    kinds = _model_types(base.config)
    if not kinds:
        raise ValueError(
            f"`{name}` may belong to an nn.Linear, or to a {CONV1D} of transformers, which has its weight transposed. "
            "Put the config.json of the model into the folder of its file."
        )
    return not kinds.isdisjoint(CONV1D_MODELS)


def _model_types(config: Any) -> set[str]:
    """The kind of a model, and of each model in it."""
    if not isinstance(config, dict):
        return set()
    kinds = {config["model_type"]} if isinstance(config.get("model_type"), str) else set()
    return kinds.union(*map(_model_types, config.values()))


def _biases(base: Weights, weights: list[QuantizedWeight]) -> Iterable[StoredTensor]:
    biases = (base.tensors.get(f"{weight.name.rpartition('.')[0]}.bias") for weight in weights)
    return (bias for bias in biases if bias is not None and bias.dtype in FLOATS)


def _cast(tensor: StoredTensor, dtype: str) -> ComputedTensor:
    """A bias in ``dtype``: torch's layers need it in the dtype of their weight."""

    def load() -> Rows:
        values = tensor.read().view(tensor.matrix_shape())
        return lambda rows: values[rows]

    return _computed(tensor, dtype, tensor.shape, load)


def _computed(tensor: StoredTensor, dtype: str, shape: tuple[int, ...], load: Callable[[], Rows]) -> ComputedTensor:
    size = torch.Size(shape).numel() * TORCH_DTYPES[dtype].itemsize
    return ComputedTensor(tensor.path, tensor.name, dtype, shape, 0, size, load)


def _view(file: TensorFile, computed: dict[str, ComputedTensor], left_out: set[str]) -> TensorFile:
    tensors = [computed.get(name, tensor) for name, tensor in file.tensors.items() if name not in left_out]
    # In a copy of the file those with the longest elements come first, so that all are aligned.
    tensors.sort(key=lambda tensor: -TORCH_DTYPES[tensor.dtype].itemsize if tensor.dtype in TORCH_DTYPES else 0)
    return replace(file, tensors={tensor.name: tensor for tensor in tensors})
