"""The adapter that comes nearest to a full fine-tune: the truncated SVD of the difference of each weight.

By Eckart and Young (1936) no pair of rank r is nearer to ``W_tuned - W_base`` in the Frobenius norm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.cli.base_match import why_tied
from lightning_lora.cli.dequantized_base import open_dequantized
from lightning_lora.cli.meta_model import is_embedding
from lightning_lora.cli.output import new_output
from lightning_lora.files.safetensors import FLOATS, StoredTensor
from lightning_lora.files.weights import Weights, keeps_transposed
from lightning_lora.names import matches, nearest
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.low_rank import truncated_svd
from lightning_lora.peft_format.save import file_writers
from lightning_lora.peft_format.stored import CONFIG, PREFIX, WEIGHTS


@dataclass(frozen=True)
class Extracted:
    """How much of the change of one layer its pair has.

    Args:
        delta: the Frobenius norm of the difference of the two weights.
        relative: delta divided by the norm of the base's weight.
        energy: the share of the squared delta that the pair has.
    """

    delta: float
    relative: float
    energy: float


@dataclass
class Extraction:
    """The extracted pairs, and the changes that they do not have.

    Args:
        layers: by the layer's name.
        unchanged: layers that are equal in both models, and have no pair.
        not_covered: other tensors that differ, with the reason why they have no pair.
    """

    layers: dict[str, Extracted] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    not_covered: dict[str, str] = field(default_factory=dict)

    def energy(self) -> float:
        """The share of the squared norm of all chosen differences that the adapter has."""
        whole = math.fsum(layer.delta**2 for layer in self.layers.values())
        kept = math.fsum(layer.energy * layer.delta**2 for layer in self.layers.values())
        return kept / whole if whole else 1.0


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    r: int = 16,
    targets: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Extraction:
    """Write the adapter of rank ``r`` that is nearest to what fine-tuning did to ``base`` as a PEFT directory.

    A full fine-tune may be far from any low rank: read ``energy`` before using the adapter. Changes of biases,
    norms and embeddings are listed and left out, as plain pairs cannot have them. Weights that bitsandbytes
    quantized are dequantized first.

    Args:
        base: the model before, a safetensors file or a directory.
        tuned: the model after.
        out: the directory to write.
        r: rank of every pair; its scale is 1.
        targets: patterns of module names; ``None`` takes every linear layer that changed.
        overwrite: replace what is at ``out``.
        progress: called with numbers of bytes as they are read.

    Raises:
        FileNotFoundError: if something is missing.
        ValueError: if files are damaged, a pattern matches nothing, or no chosen layer changed.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"up.weight": torch.zeros(2, 2)}, folder / "base.safetensors")
        >>> save_file({"up.weight": torch.diag(torch.tensor([4.0, 3.0]))}, folder / "tuned.safetensors")
        >>> found = extract(folder / "base.safetensors", folder / "tuned.safetensors", folder / "adapter", r=1)
        >>> round(found.layers["up"].energy, 4)
        0.64
    """
    if r < 1:
        raise ValueError(f"`r` must be at least 1, but got {r}.")
    before, after = open_dequantized(base), open_dequantized(tuned)
    chosen = _chosen(before, targets)
    transposed = {tensor.name: _is_transposed(tensor, before) for tensor in before.tensors.values()}
    report = Extraction()
    with new_output(out, directory=True, overwrite=overwrite, sources=[base, tuned], names={CONFIG, WEIGHTS}) as part:
        pairs: dict[str, Tensor] = {}
        for tensor in before.tensors.values():
            changed = after.tensors.get(tensor.name)
            reason = _why_not(tensor, changed, chosen, before)
            if reason is None and transposed[tensor.name] is None:
                reason = "square, and no layer near it shows whether its shape is (in, out)"
            if changed is not None and reason is None:
                pairs |= _pair(tensor, changed, r, bool(transposed[tensor.name]), report)
            elif changed is None or not _equal(tensor, changed):
                report.not_covered[tensor.name] = reason or ""
            progress(tensor.nbytes)
        report.not_covered |= {name: "not in the base" for name in after.tensors if name not in before.tensors}
        if not pairs:
            raise ValueError(f"`{tuned}` has no chosen layer that differs from `{base}`: there is nothing to extract.")
        config = _config(base, r, list(report.layers), _all_transposed(report, transposed))
        about = {"format": "pt", "extracted": "truncated SVD by lightning_lora"}
        for name, write in file_writers(json.dumps(config, indent=2) + "\n", pairs, about).items():
            write(part / name)
    return report


def _is_transposed(tensor: StoredTensor, base: Weights) -> bool | None:
    name = tensor.name.removesuffix(".weight")
    bias = base.tensors.get(f"{name}.bias")
    if len(tensor.shape) != 2 or bias is None:
        return False
    return keeps_transposed(name, base, False) if tensor.shape[0] == tensor.shape[1] else bias.shape == tensor.shape[1:]


def _all_transposed(report: Extraction, transposed: dict[str, bool | None]) -> bool:
    return all(transposed[f"{name}.weight"] for name in report.layers)


def _chosen(base: Weights, targets: Sequence[str] | None) -> set[str]:
    """The weights of the chosen layers: those with two dimensions that are no embeddings, or those of ``targets``."""
    layers = {name.removesuffix(".weight"): name for name in base.tensors if name.endswith(".weight")}
    if targets is None:
        return {key for name, key in layers.items() if len(base.tensors[key].shape) == 2 and not is_embedding(name)}
    for pattern in targets:
        if not any(matches(name, pattern) for name in layers):
            raise ValueError(
                f"`targets` has {pattern!r}, which matches no layer. The nearest are {nearest(pattern, layers)}."
            )
    return {key for name, key in layers.items() if any(matches(name, pattern) for pattern in targets)}


def _why_not(tensor: StoredTensor, changed: StoredTensor | None, chosen: set[str], base: Weights) -> str | None:
    name = tensor.name.removesuffix(".weight")
    if changed is None:
        return "not in the fine-tuned model"
    if tensor.shape != changed.shape:
        return f"{tensor.shape} became {changed.shape}"
    if not {tensor.dtype, changed.dtype} <= set(FLOATS):
        return f"of {tensor.dtype}"
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)} dimension{'s' * (len(tensor.shape) != 1)}"
    if is_embedding(name):
        return "an embedding"
    if tensor.name not in chosen:
        return "not chosen"
    return "tied to the input embedding" if why_tied(name, base) else None


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(same_bits(a, b) for (_, a), (_, b) in zip(one.slabs(), other.slabs(), strict=True))


def _pair(before: StoredTensor, after: StoredTensor, r: int, transposed: bool, report: Extraction) -> dict[str, Tensor]:
    name, weight = before.name.removesuffix(".weight"), _floats(before)
    delta = _floats(after) - weight
    size = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if not math.isfinite(size):
        raise ValueError(f"`{before.name}` has NaN or infinity in one of the two models.")
    if not size:
        report.unchanged.append(name)
        return {}
    near = truncated_svd(delta.T if transposed else delta, r)
    whole = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    report.layers[name] = Extracted(size, size / whole if whole else math.inf, near.energy)
    return {f"{PREFIX}{name}.lora_A.weight": near.A, f"{PREFIX}{name}.lora_B.weight": near.B}


def _floats(tensor: StoredTensor) -> Tensor:
    value = tensor.read()
    return value if value.dtype == torch.float64 else value.float()


def _config(base: Path, r: int, names: list[str], transposed: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
