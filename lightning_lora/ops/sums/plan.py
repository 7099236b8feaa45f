"""``W0 + scale * B A`` of layers of any shapes in one launch of a Triton kernel, and its gradients in another.

The batched products of :mod:`lightning_lora.ops.sums.batch` take a few launches for each shape. Here the kernels read
the addresses of each block's matrices from a table, which is built again only when a tensor has moved.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.ops.dispatch import supports_kernels
from lightning_lora.ops.fused_linear import PLAIN
from lightning_lora.ops.sums.batch import Block, stored_order
from lightning_lora.ops.sums.views import ALIGNMENT, Views
from lightning_lora.torch_internals import cuda_stream_id

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_R = 128
MAX_ELEMENTS = 2**31 - 2**20  # of a matrix; the kernels count them in 32 bits

Gradients = list[Tensor | None]


class SumPlan:
    """The table of the blocks of n layers, and the share of each program of a launch.

    It holds addresses, and no tensors: it is valid as long as the ``data_ptr()`` of each tensor stays the same. Rows
    that no pair adapts are blocks with a rank of 0, after the others in the table.

    Args:
        weights: W0 of each layer, all of one dtype.
        blocks: the rows that each pair (A, B) adapts, in the order of the weights.
        lefts: B of each block, ``(rows, r)``; r may differ between blocks.
        rights: A of each block, ``(r, columns)``, the columns in the order of a contiguous weight.
    """

    def __init__(
        self, weights: Sequence[Tensor], blocks: Sequence[Block], lefts: Sequence[Tensor], rights: Sequence[Tensor]
    ) -> None:
        from lightning_lora.ops.gated_kernels import padded_rank
        from lightning_lora.ops.sums import sum_kernels as kernels

        self.kernels, self.dtype, self.device = kernels, weights[0].dtype, weights[0].device
        self.strides, self.ranks = [weight.stride() for weight in weights], [len(right) for right in rights]
        self.blocks = [*blocks, *_unadapted(weights, blocks)]
        self.inner = [inner_size(weight) for weight in weights]
        self.row_sizes = [weight.numel() // len(weight) for weight in weights]
        self.columns = self._of_blocks(self.row_sizes)
        self.r = padded_rank(max(self.ranks))
        addresses = self._begins(_addresses(weights), weights[0].element_size())
        self.is_plain = self._is_plain(self._of_blocks(self.inner), addresses + _addresses(rights))
        self.of_sums, self.of_gradients = Views(weights), Views([*lefts, *rights])
        self.last: tuple[object, Tensor, bool] | None = None  # of the last gradients: where, for the kernels, plain
        self._make_table(addresses, _addresses(lefts), _addresses(rights))
        self._make_tiles()

    def _of_blocks(self, of_weights: Sequence[int]) -> list[int]:
        return [of_weights[block.weight] for block in self.blocks]

    def _begins(self, of_weights: Sequence[int], size: int = 1) -> list[int]:
        """Where each block begins, in weights that begin at these places, with elements of ``size``."""
        begins = zip(self._of_blocks(of_weights), self.blocks, self.columns, strict=True)
        return [begin + block.start * columns * size for begin, block, columns in begins]

    def _make_table(self, weights: list[int], lefts: list[int], rights: list[int]) -> None:
        n, zeros = len(lefts), [0] * (len(self.blocks) - len(lefts))
        rows = [block.stop - block.start for block in self.blocks]
        inner, of_gradients = self._of_blocks(self.inner), self.of_gradients.offsets
        offsets = of_gradients[:n], of_gradients[n:], self._begins(self.of_sums.offsets)
        d_lefts, d_rights, sums = ([offset // ALIGNMENT for offset in part] for part in offsets)
        of_pairs = [part + zeros for part in (self.ranks, lefts, rights, d_lefts, d_rights)]
        ranks, lefts, rights, d_lefts, d_rights = of_pairs
        fields = [rows, self.columns, ranks, inner, weights, lefts, rights, sums, d_lefts, d_rights]
        self.table = torch.tensor(fields).T.contiguous().to(self.device)

    def _make_tiles(self) -> None:
        height, width = self.kernels.SUM_TILE
        rows = torch.tensor([block.stop - block.start for block in self.blocks])
        columns = torch.tensor(self.columns)
        of_sums = -(-rows // height) * -(-columns // width)
        self.sum_tiles = _programs(of_sums, of_sums).to(self.device)
        n = len(self.ranks)
        of_lefts = _programs(-(-rows[:n] // self.kernels.LEFT_ROWS), columns[:n])
        of_rights = _programs(-(-columns[:n] // self.kernels.right_columns(self.r)), rows[:n])
        self.of_lefts, self.gradient_tiles = len(of_lefts), torch.cat([of_lefts, of_rights]).to(self.device)

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
        totals = torch.empty(self.of_sums.size, dtype=dtype, device=self.device)
        with torch.cuda.device(totals.get_device()):  # -1, the CPU, changes nothing
            self.kernels.launch_sums(self.sum_tiles, self.table, totals, scale, self.dtype, self.is_plain)
        return self.of_sums.of(totals)

    def gradients(
        self, gradients: Sequence[Tensor | None], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float
    ) -> tuple[Gradients, Gradients]:
        """The gradients of B, ``(rows, r)``, and those of A, ``(r, columns)``, in fp32.

        Args:
            gradients: of each sum, all of one dtype; ``None`` where there is none, as in the result.
            lefts: B of each block, as it was when the sums were computed; fp32, contiguous.
            rights: A of each block, likewise.
            scale: factor of the product.
        """
        n = len(lefts)
        if all(gradient is None for gradient in gradients):
            return [None] * n, [None] * n
        views: Gradients = [*self.of_gradients.of(self._launch_gradients(gradients, lefts, rights, scale))]
        for i, block in enumerate(self.blocks[:n]):
            if gradients[block.weight] is None:
                views[i] = views[n + i] = None
        return views[:n], views[n:]

    def _launch_gradients(
        self, gradients: Sequence[Tensor | None], lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float
    ) -> Tensor:
        dense, inner = self._dense(gradients)
        first = next(gradient for gradient in dense if gradient is not None)
        pointers = [0 if gradient is None else gradient.data_ptr() for gradient in dense]
        stream = cuda_stream_id(self.device) if self.device.type == "cuda" else 0
        where = first.element_size(), inner, pointers, _addresses(lefts), _addresses(rights)
        last = self.last
        if last is None or last[0] != (stream, where):  # in most steps nothing has moved
            self.last = last = (stream, where), *self._addresses_on_device(*where)
        _, on_device, is_plain = last
        results = torch.empty(self.of_gradients.size, device=self.device)
        with torch.cuda.device(results.get_device()):
            arguments = self.gradient_tiles, self.of_lefts, self.table, on_device, results, self.r, scale
            self.kernels.launch_gradients(*arguments, first.dtype, is_plain)
        return results

    def _addresses_on_device(
        self, size: int, inner: list[int], pointers: list[int], lefts: list[int], rights: list[int]
    ) -> tuple[Tensor, bool]:
        """For each block where dW, B and A begin, and how the rows of dW are stored; whether all are plain.

        The address of dW is 0 for what has no pair, or no gradient.
        """
        begins = self._begins(pointers, size)
        used = [i < len(lefts) and pointers[block.weight] != 0 for i, block in enumerate(self.blocks)]
        addresses = [begin if is_used else 0 for begin, is_used in zip(begins, used, strict=True)]
        zeros, inner = [0] * (len(self.blocks) - len(lefts)), self._of_blocks(inner)
        numbers = array("q", addresses + lefts + zeros + rights + zeros + inner)
        on_device = torch.frombuffer(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
        return on_device, self._is_plain(inner, addresses + rights)

    def _dense(self, gradients: Sequence[Tensor | None]) -> tuple[Gradients, list[int]]:
        """The gradients as the kernels can read them, and their :func:`inner_size`."""
        dense, inner = list(gradients), list(self.row_sizes)
        for i, gradient in enumerate(gradients):
            if gradient is None or gradient.is_contiguous():
                continue
            if gradient.stride() == self.strides[i]:
                inner[i] = self.inner[i]
            else:
                dense[i] = gradient.contiguous()
        return dense, inner

    @staticmethod
    def can_be_used(
        weights: Sequence[Tensor], blocks: Sequence[Block], lefts: Sequence[Tensor], rights: Sequence[Tensor]
    ) -> bool:
        """Whether a plan can be made of these: plain dense tensors on one GPU with Triton, A and B in fp32.

        Example:
            >>> SumPlan.can_be_used([torch.eye(2)], [Block(0, 0, 2)], [torch.ones(2, 1)], [torch.ones(1, 2)])  # CPU
            False
        """
        first = weights[0]
        if not first.is_cuda or not supports_kernels(first.get_device()):
            return False
        return can_be_read(weights, blocks, lefts, rights)


def can_be_read(
    weights: Sequence[Tensor], blocks: Sequence[Block], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> bool:
    """Whether the kernels know the dtypes, sizes and strides of these tensors, wherever they are.

    Example:
        >>> block, B, A = Block(0, 0, 2), torch.ones(2, 1), torch.ones(1, 2)
        >>> can_be_read([torch.eye(2)], [block], [B], [A]), can_be_read([torch.eye(2).double()], [block], [B], [A])
        (True, False)
    """
    device, dtype = weights[0].device, weights[0].dtype
    factors = [*lefts, *rights]
    return (
        dtype in DTYPES
        and all(type(tensor) in PLAIN and tensor.device == device for tensor in (*weights, *factors))
        and all(weight.dtype == dtype and inner_size(weight) for weight in weights)
        and all(factor.dtype == torch.float32 and factor.is_contiguous() for factor in factors)
        and all(0 < len(right) <= MAX_R and right.numel() <= MAX_ELEMENTS for right in rights)
        and all(_is_product(weights[each[0].weight], *each) for each in zip(blocks, lefts, rights, strict=True))
    )


def _is_product(weight: Tensor, block: Block, left: Tensor, right: Tensor) -> bool:
    """Whether ``left @ right`` has the elements of ``block``, row by row, which the kernels can write."""
    columns = weight.numel() // len(weight)
    if any(row * columns % ALIGNMENT for row in (block.start, block.stop) if row < len(weight)):
        return False
    return left.shape == (block.stop - block.start, len(right)) and right.shape == (len(right), columns)


def _unadapted(weights: Sequence[Tensor], blocks: Sequence[Block]) -> list[Block]:
    """The rows of ``weights`` that are in none of ``blocks``.

    Example:
        >>> _unadapted([torch.ones(6, 2)], [Block(0, 2, 3), Block(0, 3, 5)])
        [Block(weight=0, start=0, stop=2), Block(weight=0, start=5, stop=6)]
    """
    ends = [Block(i, len(weight), len(weight)) for i, weight in enumerate(weights)]
    gaps, reached = [], [0] * len(weights)
    for block in sorted([*blocks, *ends]):
        if reached[block.weight] < block.start:
            gaps.append(Block(block.weight, reached[block.weight], block.start))
        reached[block.weight] = block.stop
    return gaps


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


def _programs(counts: Tensor, work: Tensor) -> Tensor:
    """The layer and the tile of each program, for ``counts`` tiles of each layer: those with most work first."""
    order = torch.argsort(work, descending=True, stable=True)
    counts = counts[order]
    tiles = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([order.repeat_interleave(counts), tiles], 1).int()
