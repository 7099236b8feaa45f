"""What differs between two adapters, or between two models, in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.cli.dequantized_base import open_dequantized
from lightning_lora.files.safetensors import TORCH_DTYPES, StoredTensor
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.ops.low_rank import cosine, distance, norm
from lightning_lora.peft_format.directories import check_is_one, directories_in
from lightning_lora.peft_format.stored import StoredPair, config_of, is_adapter, open_adapter


@dataclass(frozen=True)
class Difference:
    """How one weight, or the delta on it, differs; norms are Frobenius norms.

    Args:
        name: of the tensor, or of the adapted layer.
        first: norm in A, ``None`` where A lacks it.
        second: norm in B, ``None`` where B lacks it.
        distance: norm of the difference, ``None`` where there is none to take.
        cosine: of the angle between the two.
        note: other differences: dtype, shape, or that only one side has it.
    """

    name: str
    first: float | None = None
    second: float | None = None
    distance: float | None = None
    cosine: float | None = None
    note: str = ""

    @property
    def relative(self) -> float | None:
        """The distance divided by the norm in A, or by the norm in B if that is zero."""
        size = self.first or self.second
        return None if self.distance is None else self.distance / size if size else 0.0

    def changed(self) -> bool:
        """Whether there is any difference."""
        return bool(self.distance) or bool(self.note) or self.distance is None


@dataclass(frozen=True)
class Differences:
    """Every weight of two models or adapters; those that differ most come first.

    Args:
        kind: ``"adapters"`` or ``"models"``.
        rows: one for each weight.
    """

    kind: str
    rows: list[Difference]

    def total(self) -> Difference:
        """The difference of all weights together, as one vector."""

        def size(values: list[float | None]) -> float:
            return math.hypot(*(value for value in values if value is not None))

        first, second = size([row.first for row in self.rows]), size([row.second for row in self.rows])
        both = [row for row in self.rows if row.cosine is not None]
        dot = sum((row.cosine or 0) * (row.first or 0) * (row.second or 0) for row in both)
        alone = [(row.first or 0.0) + (row.second or 0.0) for row in self.rows if None in (row.first, row.second)]
        apart = size([*(row.distance for row in self.rows), *alone])
        return Difference("total", first, second, apart, dot / (first * second) if first * second else None)


def diff_files(first: Path, second: Path, progress: Callable[[int], object] = lambda _: None) -> Differences:
    """Compare two PEFT directories by their deltas, or two models by their weights.

    Two adapters can have equal deltas with other A and B, ranks or scales, so A and B themselves are not compared. Two
    directories with sub-directories of several adapters are compared adapter by adapter, by their names. Weights of a
    model that bitsandbytes quantized are dequantized first.

    Args:
        first: an adapter's directory, one with sub-directories of several, or a model's file or directory.
        second: another one of the same kind.
        progress: called with numbers of bytes as they are read.

    Raises:
        ValueError: if one is an adapter and the other a model, or a file is damaged.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> first, second = (Path(tempfile.mkdtemp(), "model.safetensors") for _ in range(2))
        >>> save_file({"up.weight": torch.ones(2, 2), "up.bias": torch.ones(2)}, first)
        >>> save_file({"up.weight": torch.ones(2, 2) * 3, "up.bias": torch.ones(2)}, second)
        >>> [(row.name, row.relative) for row in diff_files(first, second).rows]
        [('up.weight', 2.0), ('up.bias', 0.0)]
    """
    for path in (first, second):
        if not path.exists():
            raise FileNotFoundError(f"`{path}` does not exist: give a model or a PEFT directory.")
    several = [_several(path) for path in (first, second)]
    if all(several):
        return _by_name(*several)
    for path in (first, second):
        check_is_one(path)
    adapters = is_adapter(first), is_adapter(second)
    if adapters[0] != adapters[1]:
        by_kind = dict(zip(adapters, (first, second), strict=True))
        raise ValueError(
            f"`{by_kind[True]}` is an adapter and `{by_kind[False]}` is a model: give two of a kind. To see what the "
            "adapter does to the model, merge it and compare the result with the model."
        )
    return _adapters(first, second) if adapters[0] else _models(first, second, progress)


def _several(path: Path) -> dict[str, Path]:
    """The sub-directories of adapters in ``path``, if it is no model that has such."""
    return directories_in(path) if path.is_dir() and not any(path.glob("*.safetensors")) else {}


def _by_name(first: Mapping[str, Path], second: Mapping[str, Path]) -> Differences:
    rows: list[Difference] = []
    for name in _union([first, second]):
        if name in first and name in second:
            found = _adapters(first[name], second[name]).rows
        else:
            sides = (first.get(name), second.get(name))
            pairs = [{} if side is None else open_adapter(side).pairs for side in sides]
            found = [_pairs(layer, *(side.get(layer) for side in pairs)) for layer in _union(pairs)]
        rows += [replace(row, name=f"{name}: {row.name}") for row in found]
    return Differences("adapters", _most_first(rows))


def _adapters(*paths: Path) -> Differences:
    adapters = [open_adapter(path) for path in paths]
    for adapter in adapters:
        config_of(adapter)  # which has the scale
    pairs, others = ([adapter.pairs for adapter in adapters], [adapter.in_full for adapter in adapters])
    rows = [_pairs(name, *(side.get(name) for side in pairs)) for name in _union(pairs)]
    rows += [_tensors(name, *(side.get(name) for side in others)) for name in _union(others)]
    return Differences("adapters", _most_first(rows))


def _union(sides: Sequence[Mapping[str, object]]) -> list[str]:
    """The names on either side, each once."""
    return list(dict.fromkeys(name for side in sides for name in side))


def _pairs(name: str, first: StoredPair | None, second: StoredPair | None) -> Difference:
    if first is None or second is None:
        return Difference(name, _size(first), _size(second), note=_alone(first))
    if first.features() != second.features():
        note = f"{_arrow(first)} in A, {_arrow(second)} in B"
        return Difference(name, norm(first.read_finite()), norm(second.read_finite()), note=note)
    first_delta, second_delta = first.read_finite(), second.read_finite()
    same = all(same_bits(a, b) for a, b in zip(first_delta, second_delta, strict=True))
    ranks = "" if first.r == second.r else f"r {first.r} and {second.r}"
    apart = 0.0 if same else distance(first_delta, second_delta)
    angle = 1.0 if same and norm(first_delta) else cosine(first_delta, second_delta)
    return Difference(name, norm(first_delta), norm(second_delta), apart, angle, ranks)


def _size(pair: StoredPair | None) -> float | None:
    return None if pair is None else norm(pair.read_finite())


def _arrow(pair: StoredPair) -> str:
    return "{} -> {}".format(*pair.features())


def _alone(first: object | None) -> str:
    return "only in B" if first is None else "only in A"


def _models(first: Path, second: Path, progress: Callable[[int], object]) -> Differences:
    sides = [open_dequantized(path).tensors for path in (first, second)]
    rows = []
    for name in _union(sides):
        rows.append(_tensors(name, *(side.get(name) for side in sides)))
        progress(sum(side[name].nbytes for side in sides if name in side))
    return Differences("models", _most_first(rows))


def _tensors(name: str, first: StoredTensor | None, second: StoredTensor | None) -> Difference:
    if first is None or second is None:
        return Difference(name, _norm(first), _norm(second), note=_alone(first))
    if first.shape != second.shape:
        return Difference(name, _norm(first), _norm(second), note=f"{first.shape} in A, {second.shape} in B")
    note = "" if first.dtype == second.dtype else f"{first.dtype} and {second.dtype}"
    if not {first.dtype, second.dtype} <= TORCH_DTYPES.keys():
        return Difference(name, note=note or f"{first.dtype} is not compared")
    return _compared(name, first, second, note)


def _compared(name: str, first: StoredTensor, second: StoredTensor, note: str) -> Difference:
    sums = torch.zeros(4, dtype=torch.float64)
    equal = first.dtype == second.dtype
    for (_, a), (_, b) in zip(first.slabs(), second.slabs(), strict=True):
        a, b = a.to(first.torch_dtype()), b.to(second.torch_dtype())  # dequantized rows are not rounded yet
        if first.dtype == second.dtype and same_bits(a, b):
            x = y = a.double()
        else:
            x, y, equal = a.double(), b.double(), False
        sums += torch.stack([x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum()])
    size_first, size_second, dot, apart = sums.tolist()
    if not math.isfinite(sum(sums.tolist())):
        return Difference(name, distance=0.0 if equal else None, note=note or ("" if equal else "NaN or infinity"))
    size = math.sqrt(size_first * size_second)
    angle = (1.0 if equal else max(-1.0, min(1.0, dot / size))) if size else None
    return Difference(name, math.sqrt(size_first), math.sqrt(size_second), math.sqrt(apart), angle, note)


def _norm(tensor: StoredTensor | None) -> float | None:
    if tensor is None or tensor.dtype not in TORCH_DTYPES:
        return None
    return math.sqrt(sum(float(_squares(rows)) for _, rows in tensor.slabs()))


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum()


def _most_first(rows: list[Difference]) -> list[Difference]:
    return sorted(rows, key=lambda row: -math.inf if row.relative is None else -row.relative)
