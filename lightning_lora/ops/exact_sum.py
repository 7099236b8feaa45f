"""Merge ``W = W0 + scale * B A`` so that W0 can be restored bit for bit.

``(W0 + delta) - delta`` is not ``W0`` in floating point. But where delta is small against W0, most elements round back
to W0, so it is enough to keep the others. Both times delta must have the same bits, wherever it is computed. So it is
an exact product (:mod:`lightning_lora.ops.exact_product`), rounded to fp32 unless the matrix is in fp64. The rest is
elementwise, one operation at a time, as a fused one would round differently; IEEE 754 leaves no choice in any of them.

Tensors are compared by their bits: -0 differs from 0, and a NaN equals itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from lightning_lora.ops.exact_product import ExactProduct
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor, stored_tensors
from lightning_lora.ops.workspace import Workspace

BLOCK = 1 << 15  # words in a block of a checksum: files hold checksums, so it may not change
WIDTH = 1 << 10  # words in a row of a quick checksum
ON_CPU = 1 << 18  # elements of a matrix in one step: what is computed with them stays in the cache of a core
ON_DEVICE = 1 << 22  # the same on a GPU, where a kernel must take longer than its launch
SQUARES = (1e-25, 1e30)  # between these numbers fp32 holds a sum of squares
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 / golden ratio as a signed integer; multiplying by an odd number is reversible


def as_integers(tensor: Tensor) -> Tensor:
    """``tensor`` reinterpreted as integers of the same width."""
    return tensor.detach().view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit; they may be on different devices."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if is_quantized_tensor(first) or is_quantized_tensor(second):
        parts = stored_tensors(first.detach()), stored_tensors(second.detach())
        return type(first) is type(second) and all(same_bits(*pair) for pair in zip(*parts, strict=True))
    first, second = first.detach().reshape(-1), second.detach().to(first.device).reshape(-1)
    return torch.equal(as_integers(first), as_integers(second))


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of words and positions, equal on every device; a change of any single word changes it."""
    words = _words(tensor)
    factors = _odd_numbers(min(BLOCK, words.numel()), words.device) * _ODD
    rows = 4 if words.device.type == "cpu" else 128
    sums = [_weighted(words[start : start + rows * BLOCK], factors) for start in range(0, words.numel(), rows * BLOCK)]
    total = torch.cat(sums) if sums else words
    count = total.numel()
    of_sums = factors[:count] if count <= len(factors) else _odd_numbers(count, words.device) * _ODD
    return int(_mixed(total, of_sums).sum())


def quick_checksum(tensor: Tensor, workspace: Workspace) -> int:
    """A 64-bit checksum of the sums of rows and of columns of words, in a fraction of the time of :func:`checksum`."""
    words = _words(tensor)
    table = words[: words.numel() // WIDTH * WIDTH].view(-1, WIDTH)

    def sums(rows: slice) -> tuple[Tensor, Tensor]:
        block = table[rows]
        if block.device.type == "cpu":  # numpy takes half of torch's time
            return block.sum(1), torch.from_numpy(block.numpy().sum(0))
        return block.sum(1), block.sum(0)

    of_rows = [words[table.numel() :]]
    of_columns = torch.zeros_like(words[:WIDTH])
    for rows, columns in workspace.map(sums, _blocks(table, 4), table.device):  # little work for an element
        of_rows.append(rows)
        of_columns += columns
    content = torch.cat([of_columns, *of_rows]).cpu().numpy().data
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _words(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor`` as 64-bit words, padded with zeros."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    return raw.view(torch.int64)


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return 2 * torch.arange(count, device=device) + 1


def _weighted(words: Tensor, factors: Tensor) -> Tensor:
    """The sum of the mixed products of ``words`` and ``factors`` for each block; the last block may be shorter."""
    if words.numel() % len(factors):
        end = words.numel() // len(factors) * len(factors)  # of the last full block
        rest = _mixed(words[end:], factors[: words.numel() - end]).sum().view(1)
        return torch.cat([_weighted(words[:end], factors), rest]) if end else rest
    return _mixed(words.view(-1, len(factors)), factors).sum(1)


def _mixed(words: Tensor, factors: Tensor) -> Tensor:
    """Products, their upper half folded onto the lower: without it, swapping two words of opposite sign is not seen."""
    products = words * factors
    products ^= products >> 32
    return products


@dataclass
class Patch:
    """Values of a matrix: all of them, or those at ``index`` of the flattened matrix."""

    values: Tensor
    index: Tensor | None = None

    def nbytes(self) -> int:
        """Its memory in bytes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


@dataclass
class Squares:
    """Squared Frobenius norms of a sum's parts, in which NaNs and infinities count as zero.

    Args:
        matrix: of the matrix.
        delta: of what was added.
        error: of what rounding lost.
        finite: whether the sum holds neither NaN nor infinity.
    """

    matrix: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    finite: bool = True

    def __add__(self, other: Squares) -> Squares:
        return Squares(
            self.matrix + other.matrix, self.delta + other.delta, self.error + other.error, self.finite and other.finite
        )

    def lost(self) -> float:
        """The norm of the rounding error, divided by the norm of delta."""
        return math.sqrt(self.error / self.delta) if self.delta else 0.0


def add_delta(matrix: Tensor, delta: ExactProduct, out: Tensor, workspace: Workspace) -> Squares:
    """Write ``matrix`` plus ``delta`` into ``out``, rounded once to its dtype, which is that of ``matrix``."""

    def add(rows: slice) -> Squares:
        original, _, _, squares = _add(matrix[rows], delta.part(rows), out[rows], workspace)
        squares.matrix = _square(original, _dot(original))
        return squares

    return sum(workspace.map(add, _blocks(matrix), matrix.device), Squares())


def merge_delta(matrix: Tensor, delta: ExactProduct, out: Tensor, workspace: Workspace) -> tuple[Patch, Squares]:
    """As :func:`add_delta`, with the patch that turns ``out`` minus ``delta`` into ``matrix`` again.

    Nobody asks for the norm of ``matrix`` here, so it is not computed.
    """

    def merge(rows: slice) -> tuple[Patch, Squares]:
        _, block, total, squares = _add(matrix[rows], delta.part(rows), out[rows], workspace)
        restored = torch.sub(total, block, out=workspace.memory("restored", total, matrix.dtype))
        return _patch(matrix, rows, restored, not squares.finite), squares

    parts = workspace.map(merge, _blocks(matrix), matrix.device)
    return _joined([patch for patch, _ in parts], matrix), sum((squares for _, squares in parts), Squares())


def subtract_delta(matrix: Tensor, delta: ExactProduct, out: Tensor, workspace: Workspace) -> Tensor:
    """Write ``matrix`` minus ``delta`` into ``out``: the original except for a few elements."""

    def subtract(rows: slice) -> None:
        block = _rows_of(delta.part(rows), matrix[rows], workspace)
        torch.sub(workspace.cast("original", matrix[rows], block.dtype), block, out=out[rows])

    workspace.map(subtract, _blocks(matrix), matrix.device)
    return out


def patch_for(original: Tensor, restored: Tensor) -> Patch:
    """The patch that turns ``restored``, which is overwritten, into ``original``."""
    return _joined([_patch(original, slice(0, len(original)), restored, True)], original)


def apply_patch(restored: Tensor, patch: Patch) -> Tensor:
    """Write the elements of ``patch`` into ``restored``, a contiguous matrix: the original, bit for bit."""
    values = patch.values.to(restored.device)
    if patch.index is None:
        return restored.copy_(values)
    restored.view(-1)[patch.index.to(restored.device, torch.int64)] = values
    return restored


def _blocks(matrix: Tensor, times: int = 1) -> list[slice]:
    height, width = matrix.shape
    count = max(1, times * (ON_CPU if matrix.device.type == "cpu" else ON_DEVICE) // max(1, width))
    return [slice(start, min(start + count, height)) for start in range(0, height, count)]


def _rows_of(delta: ExactProduct, matrix: Tensor, workspace: Workspace) -> Tensor:
    """Rows of ``delta`` in fp32, or in fp64 for a ``matrix`` in fp64."""
    product = delta.compute(workspace.memory("product", matrix, torch.float64))
    return workspace.cast("delta", product, torch.promote_types(matrix.dtype, torch.float32))


def _add(
    matrix: Tensor, delta: ExactProduct, out: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor, Squares]:
    """Write the sum into ``out``; return the matrix, delta and the sum in the dtype of delta, and two norms."""
    block = _rows_of(delta, matrix, workspace)
    original = workspace.cast("original", matrix, block.dtype)
    torch.add(original, block, out=out)  # in the dtype of its inputs, then rounded to that of `out`
    total = workspace.cast("total", out, block.dtype)
    error = torch.sub(total, original, out=workspace.memory("error", total, total.dtype)).sub_(block)
    square = _dot(error)
    # Where the sum is not finite, neither is its error, nor the square of that. A sum is much faster than `isfinite`.
    finite = math.isfinite(square) or math.isfinite(float(error.sum()))
    squares = Squares(delta=_square(block, _dot(block)), error=_square(error, square), finite=finite)
    if not finite:
        out.masked_fill_(out.isnan(), math.nan)  # devices differ in the bits of a NaN that they compute
    return original, block, total, squares


def _dot(matrix: Tensor) -> float:
    numbers = matrix.flatten()
    return float(torch.dot(numbers, numbers))


def _square(matrix: Tensor, square: float) -> float:
    """The squared norm of a matrix in fp32 or fp64, without its NaNs and infinities, by what :func:`_dot` gave."""
    if SQUARES[0] < square < SQUARES[1]:
        return square
    return _dot(matrix.double().nan_to_num(0, 0, 0))  # a copy: fp64 numbers are those of the weight itself


def _patch(matrix: Tensor, rows: slice, restored: Tensor, nan: bool) -> Patch:
    """The elements in some rows of ``matrix`` that are others in ``restored``, which is overwritten.

    With ``nan`` every NaN counts as different: the bits of a NaN that takes part in a sum depend on the device.
    """
    original = matrix[rows]
    if nan:
        as_integers(restored).masked_fill_(original.isnan(), 0)
    index = _differing(as_integers(original), as_integers(restored))
    values = original.flatten().index_select(0, index)
    index += rows.start * matrix.shape[1]
    return Patch(values, index.to(torch.int32 if matrix.numel() < 2**31 else torch.int64))


def _differing(first: Tensor, second: Tensor) -> Tensor:
    """The indices, in the flattened matrix, of the integers that are not equal."""
    if first.device.type == "cpu":  # numpy takes a fraction of torch's time
        return torch.from_numpy((first.numpy() != second.numpy()).ravel().nonzero()[0])
    return (first != second).flatten().nonzero().flatten()


def _joined(patches: Sequence[Patch], matrix: Tensor) -> Patch:
    """One patch on the CPU of those of all rows, or a copy of ``matrix`` where that is smaller."""
    if sum(patch.nbytes() for patch in patches) >= matrix.nbytes:
        return Patch(matrix.to("cpu", copy=True))
    values, index = zip(*((patch.values, patch.index) for patch in patches), strict=True)
    return Patch(torch.cat(values).cpu(), torch.cat(index).cpu())
