"""``W0 + scale * B A`` of layers of any shapes in one launch of a Triton kernel, and its gradients in two.

The batched products of :mod:`lightning_lora.ops.weight_batch` take a few launches for each shape. Here the kernels read
from a table where the matrices of each layer are. The table is made once, as long as the layers stay where they are.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lora.ops.dispatch import supports_kernels
from lightning_lora.ops.weight_batch import stored_order

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_R = 128
MAX_ELEMENTS = 2**31 - 2**20  # of a matrix; the kernels count them in 32 bits

Gradients = list[Tensor | None]


class SumPlan:
    """The table of n layers, and the share of each program of a launch.

    It holds addresses, and no tensors: it is valid as long as the ``data_ptr()`` of each tensor stays the same.

    Args:
        weights: W0 of each layer, all of one dtype.
        lefts: B of each layer, ``(rows, r)``; r may differ between layers.
        rights: A of each layer, ``(r, columns)``, the columns in the order of a contiguous weight.
    """

    def __init__(self, weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        from lightning_lora.ops import weight_sum_kernels as kernels

        self.kernels, self.dtype, self.device = kernels, weights[0].dtype, weights[0].device
        self.shapes, self.strides = [weight.shape for weight in weights], [weight.stride() for weight in weights]
        self.left_shapes, self.right_shapes = [left.shape for left in lefts], [right.shape for right in rights]
        self.left_strides, self.right_strides = [left.stride() for left in lefts], [right.stride() for right in rights]
        self.columns = [right.shape[1] for right in rights]
        self.inner = [inner_size(weight) for weight in weights]
        self.r = kernels.padded_rank(max(left.shape[1] for left in lefts))
        weight_addresses, right_addresses = _addresses(weights), _addresses(rights)
        self.is_plain = self._is_plain(self.inner, weight_addresses + right_addresses)
        self.sum_offsets, self.sums_size = _offsets([weight.numel() for weight in weights], kernels.UNIT.value)
        sizes = [factor.numel() for factor in (*lefts, *rights)]
        self.gradient_offsets, self.gradients_size = _offsets(sizes, kernels.UNIT.value)
        self._make_table(weight_addresses, _addresses(lefts), right_addresses)
        self._make_tiles()

    def _make_table(self, *addresses: list[int]) -> None:
        unit, rows, ranks = self.kernels.UNIT.value, *zip(*self.left_shapes, strict=True)
        units = [offset // unit for offset in self.sum_offsets + self.gradient_offsets]
        n = len(rows)
        fields = [rows, self.columns, ranks, self.inner, *addresses, units[:n], units[n : 2 * n], units[2 * n :]]
        self.table = torch.tensor(fields).T.contiguous().to(self.device)

    def _make_tiles(self) -> None:
        height, width = self.kernels.SUM_TILE
        rows = torch.tensor([shape[0] for shape in self.left_shapes])
        columns = torch.tensor(self.columns)
        of_sums = -(-rows // height) * -(-columns // width)
        self.sum_tiles = _programs(of_sums, of_sums).to(self.device)
        of_lefts = _programs(-(-rows // self.kernels.LEFT_ROWS), columns)
        of_rights = _programs(-(-columns // self.kernels.right_columns(self.r)), rows)
        self.gradient_tiles = of_lefts.to(self.device), of_rights.to(self.device)

    def _is_plain(self, inner: list[int], addresses: list[int]) -> bool:
        """Whether the kernels may read 16 bytes at a time, of rows in the order of A."""
        are_aligned = not any(address % 16 for address in addresses)
        return are_aligned and inner == self.columns and not any(columns % 16 for columns in self.columns)

    def sums(self, scale: float, dtype: torch.dtype) -> list[Tensor]:
        """``W0 + scale * B A`` of each layer, computed in fp32, rounded once, with the strides of W0; B = 0 gives W0.

        Args:
            scale: factor of the product.
            dtype: of the sums.
        """
        totals = torch.empty(self.sums_size, dtype=dtype, device=self.device)
        with torch.cuda.device(totals.get_device()):  # -1, the CPU, changes nothing
            self.kernels.launch_sums(self.sum_tiles, self.table, totals, scale, self.dtype, self.is_plain)
        return list(map(totals.as_strided, self.shapes, self.strides, self.sum_offsets))

    def gradients(
        self, gradients: Sequence[Tensor | None], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float
    ) -> tuple[Gradients, Gradients]:
        """The gradients of B, ``(rows, r)``, and those of A, ``(r, columns)``, in fp32.

        Args:
            gradients: of each sum, all of one dtype; ``None`` where there is none, as in the result.
            lefts: B of each layer, as it was when the sums were computed; fp32, contiguous.
            rights: A of each layer, likewise.
            scale: factor of the product.
        """
        if all(gradient is None for gradient in gradients):
            return [None] * len(gradients), [None] * len(gradients)
        results = self._launch_gradients(gradients, lefts, rights, scale)
        shapes, strides = self.left_shapes + self.right_shapes, self.left_strides + self.right_strides
        views = list(map(results.as_strided, shapes, strides, self.gradient_offsets))
        used = [None if gradient is None else view for gradient, view in zip(2 * [*gradients], views, strict=True)]
        return used[: len(gradients)], used[len(gradients) :]

    def _launch_gradients(
        self, gradients: Sequence[Tensor | None], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float
    ) -> Tensor:
        dense, inner = self._dense(gradients)
        dtype = next(gradient.dtype for gradient in dense if gradient is not None)
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in dense]
        right_addresses = _addresses(rights)
        is_plain = self._is_plain(inner, addresses + right_addresses)
        numbers = array("q", addresses + _addresses(lefts) + right_addresses + inner)
        on_device = torch.frombuffer(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
        results = torch.empty(self.gradients_size, device=self.device)
        with torch.cuda.device(results.get_device()):
            self.kernels.launch_gradients(
                self.gradient_tiles, self.table, on_device, results, self.r, scale, dtype, is_plain
            )
        return results

    def _dense(self, gradients: Sequence[Tensor | None]) -> tuple[Gradients, list[int]]:
        """The gradients as the kernels can read them, and their :func:`inner_size`."""
        dense, inner = list(gradients), list(self.columns)
        for i, gradient in enumerate(gradients):
            if gradient is None or gradient.is_contiguous():
                continue
            if gradient.stride() == self.strides[i]:
                inner[i] = self.inner[i]
            else:
                dense[i] = gradient.contiguous()
        return dense, inner

    @staticmethod
    def can_be_used(weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> bool:
        """Whether a plan can be made of these: plain dense tensors on one GPU with Triton, A and B in fp32.

        Example:
            >>> SumPlan.can_be_used([torch.eye(2)], [torch.ones(2, 1)], [torch.ones(1, 2)])  # on the CPU
            False
        """
        first = weights[0]
        if not first.is_cuda or not supports_kernels(first.get_device()):
            return False
        return can_be_read(weights, lefts, rights)


def can_be_read(weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> bool:
    """Whether the kernels know the dtypes, sizes and strides of these tensors, wherever they are.

    Example:
        >>> B, A = torch.ones(2, 1), torch.ones(1, 2)
        >>> can_be_read([torch.eye(2)], [B], [A]), can_be_read([torch.eye(2).double()], [B], [A])
        (True, False)
    """
    device, dtype = weights[0].device, weights[0].dtype
    factors = [*lefts, *rights]
    return (
        dtype in DTYPES
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.device == device for tensor in (*weights, *factors))
        and all(weight.dtype == dtype and inner_size(weight) for weight in weights)
        and all(factor.dtype == torch.float32 and factor.is_contiguous() for factor in factors)
        and all(0 < len(right) <= MAX_R and right.numel() <= MAX_ELEMENTS for right in rights)
        and all(map(_is_product, weights, lefts, rights))
    )


def _is_product(weight: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether ``left @ right`` has the elements of ``weight``, row by row."""
    rows, r = len(weight), len(right)
    return left.shape == (rows, r) and right.shape == (r, weight.numel() // rows)


def inner_size(weight: Tensor) -> int:
    """How the rows of ``weight`` are stored: 0 if the kernels cannot read it.

    A row is a sequence of blocks of this many elements. Element i of block j stands at ``i * (number of blocks) + j``
    of the contiguous row. So it is the size of a row of a contiguous weight, and the input channels in
    ``channels_last``.

    Example:
        >>> weight = torch.empty(4, 3, 2, 2)
        >>> inner_size(weight), inner_size(weight.to(memory_format=torch.channels_last)), inner_size(weight.mT)
        (12, 3, 0)
    """
    if not 0 < weight.numel() <= MAX_ELEMENTS or weight.dim() < 2:
        return 0
    if weight.is_contiguous():
        return weight.numel() // len(weight)
    order = [dimension for dimension in stored_order(weight) if weight.shape[dimension] > 1]
    if not weight.permute(order + [d for d in range(weight.dim()) if d not in order]).is_contiguous():
        return 0
    inner = order[1:] if order[0] == 0 else order
    start = inner.index(min(inner))
    if inner[start:] + inner[:start] != sorted(inner):
        return 0
    return math.prod(weight.shape[dimension] for dimension in inner[start:])


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _offsets(sizes: list[int], unit: int) -> tuple[list[int], int]:
    """Where parts of ``sizes`` begin in one allocation, at multiples of ``unit``, and the size of that."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // unit) * unit
    return offsets, end


def _programs(counts: Tensor, work: Tensor) -> Tensor:
    """The layer and the tile of each program, for ``counts`` tiles of each layer: those with most work first."""
    order = torch.argsort(work, descending=True, stable=True)
    counts = counts[order]
    tiles = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([order.repeat_interleave(counts), tiles], 1).int()
