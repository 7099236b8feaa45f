"""What differs between two adapters, or between two models, in files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.files.safetensors import TORCH_DTYPES, StoredTensor
from lightning_lora.files.weights import open_weights
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.low_rank import cosine, distance, norm
from lightning_lora.peft_format.stored import StoredPair, config_of, is_adapter, open_adapter


@dataclass(frozen=True)
class Difference:
    """How one weight, or the delta on it, differs; norms are Frobenius norms.

    Args:
        name: of the tensor, or of the adapted map.
        first: norm in A, ``None`` where A lacks it.
        second: norm in B, ``None`` where B lacks it.
        distance: norm of the difference, ``None`` where there is none to take.
        cosine: of the angle between the two.
        note: what else differs: dtype, shape, or that it is on one side only.
    """

    name: str
    first: float | None = None
    second: float | None = None
    distance: float | None = None
    cosine: float | None = None
    note: str = ""

    @property
    def relative(self) -> float | None:
        """The distance as a share of the norm in A, or where that is zero of the norm in B."""
        size = self.first or self.second
        return None if self.distance is None else self.distance / size if size else 0.0

    def changed(self) -> bool:
        """Whether there is any difference."""
        return bool(self.distance) or bool(self.note) or self.distance is None


@dataclass(frozen=True)
class Differences:
    """Every weight of two models or adapters, those that differ most first.

    Args:
        kind: ``"adapters"`` or ``"models"``.
        rows: one for each weight.
    """

    kind: str
    rows: list[Difference]

    def total(self) -> Difference:
        """All of them as if they were one vector."""

        def size(values: list[float | None]) -> float:
            return math.hypot(*(value for value in values if value is not None))

        one, other = size([row.first for row in self.rows]), size([row.second for row in self.rows])
        both = [row for row in self.rows if row.cosine is not None]
        dot = sum((row.cosine or 0) * (row.first or 0) * (row.second or 0) for row in both)
        alone = [(row.first or 0.0) + (row.second or 0.0) for row in self.rows if None in (row.first, row.second)]
        apart = size([*(row.distance for row in self.rows), *alone])
        return Difference("total", one, other, apart, dot / (one * other) if one * other else None)


def diff_files(one: Path, other: Path, progress: Callable[[int], object] = lambda _: None) -> Differences:
    """Compare two PEFT directories by their deltas, or two models by their weights.

    Two adapters can have equal deltas with other A and B, ranks or scales, so A and B themselves are not compared.

    Args:
        one: an adapter's directory, or a model's file or directory.
        other: the same kind of thing.
        progress: called with numbers of bytes as they are read.

    Raises:
        ValueError: if one is an adapter and the other a model, or a file is damaged.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> one, other = (Path(tempfile.mkdtemp(), "model.safetensors") for _ in range(2))
        >>> save_file({"up.weight": torch.ones(2, 2), "up.bias": torch.ones(2)}, one)
        >>> save_file({"up.weight": torch.ones(2, 2) * 3, "up.bias": torch.ones(2)}, other)
        >>> [(row.name, row.relative) for row in diff_files(one, other).rows]
        [('up.weight', 2.0), ('up.bias', 0.0)]
    """
    for path in (one, other):
        if not path.exists():
            raise FileNotFoundError(f"`{path}` does not exist: give a model or a PEFT directory.")
    adapters = is_adapter(one), is_adapter(other)
    if adapters[0] != adapters[1]:
        found = dict(zip(adapters, (one, other), strict=True))
        raise ValueError(
            f"`{found[True]}` is an adapter and `{found[False]}` is a model: give two of a kind. To see what the "
            "adapter does to the model, merge it and compare the result with the model."
        )
    return _adapters(one, other) if adapters[0] else _models(one, other, progress)


def _adapters(one: Path, other: Path) -> Differences:
    found = [open_adapter(one), open_adapter(other)]
    for adapter in found:
        config_of(adapter)
    first, second = (adapter.pairs for adapter in found)
    rows = [_pairs(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]
    whole, others = (adapter.in_full for adapter in found)
    rows += [_tensors(name, whole.get(name), others.get(name)) for name in dict.fromkeys([*whole, *others])]
    return Differences("adapters", _most_first(rows))


def _pairs(name: str, one: StoredPair | None, other: StoredPair | None) -> Difference:
    if one is None or other is None:
        return Difference(name, _size(one), _size(other), note=_alone(one))
    if one.features() != other.features():
        note = f"{_arrow(one)} in A, {_arrow(other)} in B"
        return Difference(name, norm(one.read_finite()), norm(other.read_finite()), note=note)
    first, second = one.read_finite(), other.read_finite()
    same = all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    ranks = "" if one.r == other.r else f"r {one.r} and {other.r}"
    apart = 0.0 if same else distance(first, second)
    return Difference(
        name, norm(first), norm(second), apart, 1.0 if same and norm(first) else cosine(first, second), ranks
    )


def _size(pair: StoredPair | None) -> float | None:
    return None if pair is None else norm(pair.read_finite())


def _arrow(pair: StoredPair) -> str:
    return "{} -> {}".format(*pair.features())


def _alone(one: object | None) -> str:
    return "only in B" if one is None else "only in A"


def _models(one: Path, other: Path, progress: Callable[[int], object]) -> Differences:
    first, second = open_weights(one).tensors, open_weights(other).tensors
    rows = []
    for name in dict.fromkeys([*first, *second]):
        rows.append(_tensors(name, first.get(name), second.get(name)))
        progress(sum(tensors[name].nbytes for tensors in (first, second) if name in tensors))
    return Differences("models", _most_first(rows))


def _tensors(name: str, one: StoredTensor | None, other: StoredTensor | None) -> Difference:
    if one is None or other is None:
        return Difference(name, _norm(one), _norm(other), note=_alone(one))
    if one.shape != other.shape:
        return Difference(name, _norm(one), _norm(other), note=f"{one.shape} in A, {other.shape} in B")
    note = "" if one.dtype == other.dtype else f"{one.dtype} and {other.dtype}"
    if not {one.dtype, other.dtype} <= TORCH_DTYPES.keys():
        return Difference(name, note=note or f"{one.dtype} is not compared")
    return _compared(name, one, other, note)


def _compared(name: str, one: StoredTensor, other: StoredTensor, note: str) -> Difference:
    sums = torch.zeros(4, dtype=torch.float64)
    equal = one.dtype == other.dtype
    for (_, a), (_, b) in zip(one.slabs(), other.slabs(), strict=True):
        if one.dtype == other.dtype and same_bits(a, b):
            x = y = a.double()
        else:
            x, y, equal = a.double(), b.double(), False
        sums += torch.stack([x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum()])
    size_one, size_other, dot, apart = sums.tolist()
    if not math.isfinite(sum(sums.tolist())):
        return Difference(
            name, distance=0.0 if equal else None, note=note or ("" if equal else "NaN or infinite numbers")
        )
    size = math.sqrt(size_one * size_other)
    angle = (1.0 if equal else max(-1.0, min(1.0, dot / size))) if size else None
    return Difference(name, math.sqrt(size_one), math.sqrt(size_other), math.sqrt(apart), angle, note)


def _norm(tensor: StoredTensor | None) -> float | None:
    if tensor is None or tensor.dtype not in TORCH_DTYPES:
        return None
    return math.sqrt(sum(float(_squares(rows)) for _, rows in tensor.slabs()))


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum()


def _most_first(rows: list[Difference]) -> list[Difference]:
    return sorted(rows, key=lambda row: -math.inf if row.relative is None else -row.relative)
