"""``W = W0 + scale * B A`` in files: a base and PEFT directories to a merged model, a few rows in memory at a time.

The sums are those of :func:`lightning_lora.merge_lora`, to the bit: in fp32 (fp64 for an fp64 base), rounded once.
Everything else is copied byte by byte. A quantized base is dequantized layer by layer.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.cli.base_match import Changes, StoredTarget, changes
from lightning_lora.cli.base_values import check_base, with_digests
from lightning_lora.cli.combined_changes import CombinedChanges, combined
from lightning_lora.cli.dequantized_base import ComputedTensor, dequantized_base
from lightning_lora.cli.output import new_output
from lightning_lora.cli.quantized_weights import is_quantized_in
from lightning_lora.files.in_turns import read_ahead
from lightning_lora.files.json_files import read_object
from lightning_lora.files.safetensors import StoredTensor, TensorFile
from lightning_lora.files.safetensors_writing import write_like
from lightning_lora.files.weights import Weights, open_weights
from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_product import ExactProduct, exact_product
from lightning_lora.ops.workspace import Workspace
from lightning_lora.peft_format.stored import CONFIG, StoredAdapter, open_adapter

# Weights in other formats than the one that is merged, which would stay as they were.
OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
)


@dataclass
class MergedLayer:
    """The effect of the merge on one weight.

    Args:
        weight: its Frobenius norm.
        delta: the norm of what was added.
        lost: the share of delta that rounding to the weight's dtype lost.
    """

    weight: float = 0.0
    delta: float = 0.0
    lost: float = 0.0


@dataclass
class MergeReport:
    """The result of a merge.

    Args:
        layers: by the weight's name.
        replaced: tensors of the base that the adapter has in full.
        added: tensors that only the adapter has.
        left_out: files of the base that were not copied: other weights, and links out of the base.
        quantized: weights that were quantized when an adapter was trained on them, so that no values are compared.
        dequantized: weights of a quantized base that are plain ones in the result.
        written: size of the merged weights in bytes.
    """

    layers: dict[str, MergedLayer] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    dequantized: list[str] = field(default_factory=list)
    written: int = 0

    def lost(self) -> float:
        """The share of the whole delta's norm that rounding lost."""
        size = math.hypot(*(layer.delta for layer in self.layers.values()))
        return math.hypot(*(layer.lost * layer.delta for layer in self.layers.values())) / size if size else 0.0


def merge_files(
    base: Path,
    adapter: Path | Mapping[Path, float],
    out: Path,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
    dequantize: bool = False,
) -> MergeReport:
    """Merge the PEFT directory ``adapter``, or several, into the model ``base`` and write the result to ``out``.

    ``out`` gets the files of ``base``: the same shards and index, and the other files. It appears when it is
    complete. Memory is that of the adapter's largest pair and a few million numbers, whatever the size of the model.
    Of a quantized base the codes of one weight come in addition.

    Args:
        base: a ``.safetensors`` file, or a directory with one or with several and their index.
        adapter: a PEFT directory, or several with the factor of the update of each.
        out: a file if ``base`` is one, else a directory.
        overwrite: replace what is at ``out``.
        progress: called with numbers of bytes as they are written.
        dequantize: ``base`` is quantized by bitsandbytes, and ``out`` gets its dequantized weights with the updates:
            they are bit-identical to those of ``merge_lora(model, dequantize=True)``. Biases are those in the file; in
            memory the first call of a 4-bit layer has cast its bias to the dtype in which it computes.

    Raises:
        FileNotFoundError: if something is missing.
        FileExistsError: if ``out`` is there already.
        ValueError: if files are damaged, do not fit each other, have NaN or infinity, or a target is tied, or two
            adapters have a tensor in full.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"up.weight": torch.zeros(2, 3)}, folder / "base.safetensors")
        >>> (folder / "adapter").mkdir()
        >>> config = '{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up"]}'
        >>> _ = (folder / "adapter/adapter_config.json").write_text(config)
        >>> pair = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(2, 1)}
        >>> pair = {f"base_model.model.up.{key}": value for key, value in pair.items()}
        >>> save_file(pair, folder / "adapter/adapter_model.safetensors")
        >>> merge_files(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors").lost()
        0.0
        >>> load_file(folder / "merged.safetensors")["up.weight"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    factors = {adapter: 1.0} if isinstance(adapter, Path) else dict(adapter)
    stored, workspace = open_weights(base), Workspace()
    weights = dequantized_base(stored) if dequantize else stored
    report = MergeReport(dequantized=[name for name in weights.tensors if is_quantized_in(name, stored)])
    adapters = {path: open_adapter(path) for path in factors}
    change = combined({path: _changes(adapter, weights, report) for path, adapter in adapters.items()}, factors)
    directory = base.is_dir()
    report.replaced = [name for name in change.in_full if name in weights.tensors]
    report.added = [name for name in change.in_full if name not in weights.tensors]
    report.written = sum(tensor.nbytes for tensor in weights.tensors.values())
    sources = [base, *factors]
    output = new_output(
        out, directory=directory, overwrite=overwrite, sources=sources, size=report.written, names=_names(base)
    )
    with output as part, workspace:
        for file in with_digests(weights.files, [adapters[path] for path in factors if factors[path]]):
            last = file.path == weights.files[-1].path
            added = {name: change.in_full[name].read_finite() for name in report.added} if last else {}
            target = part / file.path.name if directory else part
            _write(file, target, change, added, report, progress, workspace)
        if directory:
            report.left_out = _copy_others(weights, part)
            _write_config(stored, weights, part)
            _write_index(stored, weights, part, {name: change.in_full[name] for name in report.added})
    return report


def _changes(adapter: StoredAdapter, base: Weights, report: MergeReport) -> Changes:
    change = changes(adapter, base)
    report.quantized += check_base(adapter, change, base)
    return change


def _write(
    file: TensorFile,
    path: Path,
    change: CombinedChanges,
    added: dict[str, Tensor],
    report: MergeReport,
    progress: Callable[[int], object],
    workspace: Workspace,
) -> None:
    memory = cycle(("one sum", "the next sum"))  # one sum is computed while the one before it is written
    computed = {name: _rounded(tensor) for name, tensor in file.tensors.items() if isinstance(tensor, ComputedTensor)}
    merged = {
        name: _sums(file.tensors[name], change.pairs[name], report, workspace, memory)
        for name in file.tensors
        if name in change.pairs
    }
    replaced = {
        name: _cast(file.tensors[name], change.in_full[name]) for name in file.tensors if name in change.in_full
    }
    write_like(file, path, computed | merged | replaced, added, progress)


def _rounded(tensor: ComputedTensor) -> Iterator[Tensor]:
    for _, values in read_ahead(tensor.slabs()):
        yield values.to(tensor.torch_dtype())


def _sums(
    weight: StoredTensor, targets: list[StoredTarget], report: MergeReport, workspace: Workspace, memory: Iterator[str]
) -> Iterator[Tensor]:
    dtype = torch.promote_types(weight.torch_dtype(), torch.float32)
    delta = _delta(targets, dtype)
    layer = report.layers.setdefault(weight.name, MergedLayer())
    squares = exact.Squares()
    for rows, values in read_ahead(targets[0].start.slabs()):
        matrix = values if isinstance(targets[0].start, ComputedTensor) else values.to(weight.torch_dtype())
        total = workspace.memory(next(memory), matrix, matrix.dtype)
        squares += exact.add_delta(matrix, delta.part(rows), total, workspace)
        rounded = total.to(weight.torch_dtype())
        if rounded is not total:  # of a dequantized weight
            error = float((rounded - total).double().square().sum())
            squares += exact.Squares(error=error, finite=bool(rounded.isfinite().all()))
        if not squares.finite:
            _refuse(weight, matrix)
        yield rounded
    layer.weight, layer.delta, layer.lost = math.sqrt(squares.matrix), math.sqrt(squares.delta), squares.lost()


def _delta(targets: list[StoredTarget], dtype: torch.dtype) -> ExactProduct:
    pairs = [(target.pair.read_finite(dtype, target.factor), target.transposed) for target in targets]
    if isinstance(targets[0].start, ComputedTensor) and targets[0].transposed:
        # In memory the sum of dequantized weights is computed first, and transposed then.
        product = exact_product([(B, A) for (B, A), _ in pairs], dtype)
        return ExactProduct([(right.T, left.T) for left, right in product.terms])
    return exact_product([(A.T, B.T) if transposed else (B, A) for (B, A), transposed in pairs], dtype)


def _refuse(weight: StoredTensor, matrix: Tensor) -> None:
    if bool(matrix.isfinite().all()):
        raise ValueError(
            f"`{weight.name}` overflows {weight.dtype} when delta is added: give the base in fp32 or bf16."
        )
    raise ValueError(f"`{weight.name}` of the base has NaN or infinity: {weight.path} is damaged.")


def _cast(own: StoredTensor, instead: StoredTensor) -> Iterator[Tensor]:
    value = instead.read_finite().to(own.torch_dtype())
    if not bool(value.isfinite().all()):
        raise ValueError(f"`{own.name}` of the adapter overflows {own.dtype}: give the base in fp32 or bf16.")
    yield value


def _names(base: Path) -> set[str]:
    """The names that a merged copy of ``base`` may have."""
    return {str(path.relative_to(base)) for path in base.rglob("*")} if base.is_dir() else set()


def _copy_others(base: Weights, out: Path) -> list[str]:
    """Copy the files that hold no weights, and return the names of the others."""
    left = []
    used = {file.path.name for file in base.files} | ({base.index.name} if base.index else set())
    for folder, inside, files in os.walk(base.path):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for path in (Path(folder, name) for name in files):
            relative = path.relative_to(base.path)
            if str(relative) in used or not path.is_file():
                continue
            # An adapter_config.json would make transformers look for an adapter to apply again.
            if path.name.endswith((*OTHER_WEIGHTS, ".index.json", CONFIG)) or not _is_inside(path, base.path):
                left.append(str(relative))
                continue
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / relative)
    return sorted(left)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` does not link out of ``folder``, other than to the blobs of a Hugging Face cache."""
    target, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(blobs))


def _write_config(stored: Weights, written: Weights, out: Path) -> None:
    """Write a config.json without what described the quantization of the ``stored`` weights."""
    if stored.config != written.config:
        (out / "config.json").write_text(json.dumps(written.config, indent=2) + "\n")


def _write_index(stored: Weights, written: Weights, out: Path, added: dict[str, StoredTensor]) -> None:
    if stored.index is None:
        return
    index = read_object(stored.index)
    places = {name: file for name, file in index["weight_map"].items() if name in written.tensors}
    index["weight_map"] = places | dict.fromkeys(added, stored.files[-1].path.name)
    metadata, counted = index.get("metadata"), list(added.values())
    if written is not stored:
        counted += written.tensors.values()
    sums = {"total_size": sum(t.nbytes for t in counted), "total_parameters": sum(t.numel() for t in counted)}
    for key, count in sums.items():
        if isinstance(metadata, dict) and isinstance(metadata.get(key), int):
            metadata[key] = count + (metadata[key] if written is stored else 0)
    (out / stored.index.name).write_text(json.dumps(index, indent=2) + "\n")
