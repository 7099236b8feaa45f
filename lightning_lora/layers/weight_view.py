"""What one pair (A, B) adapts: a parameter as a matrix, some of its rows, or one matrix per expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.nn import functional as F

from lightning_lora.distributed.sharded import shape_of, shard_region


@dataclass(frozen=True)
class Rows:
    """Rows ``start:stop`` of each of ``blocks`` equal blocks of rows of a matrix.

    A linear layer that fuses query, key and value stores them one after the other (one block), or head by head (one
    block per head, or per group of heads).
    """

    start: int
    stop: int
    blocks: int = 1

    def count(self) -> int:
        """The number of rows."""
        return self.blocks * (self.stop - self.start)

    def place(self, B: Tensor, out_features: int) -> Tensor:
        """``B`` of shape ``(count, r)`` as ``(out_features, r)``, zero in all other rows."""
        size = out_features // self.blocks
        blocks = B.view(self.blocks, self.stop - self.start, B.shape[-1])
        return F.pad(blocks, (0, 0, self.start, size - self.stop)).reshape(out_features, B.shape[-1])


@dataclass(frozen=True)
class WeightPart:
    """One matrix of a layer.

    Args:
        key: the name of the parameter that contains it.
        name: its name in the layer; empty if it is the only one.
        rows: the rows of W0 that are adapted; ``None`` for all.
        transposed: whether the parameter is stored as ``(in_features, out_features)``.
        stacked: whether the parameter has one matrix per expert, along its first dimension.
        read: whether the parameter is adapted at each read, not by the forward of its layer.
        shape: of W0, where the parameter may have another one, as codes of a quantized weight have.
    """

    key: str = "weight"
    name: str = ""
    rows: Rows | None = None
    transposed: bool = False
    stacked: bool = False
    read: bool = False
    shape: tuple[int, int] | None = None

    def full_features(self, weight: Tensor) -> tuple[int, int]:
        """``(in_features, out_features)`` of W0, which ``weight`` stores in the shape of its layer."""
        shape = self.shape or shape_of(weight)
        first, *rest = shape[1:] if self.stacked else shape
        return (first, math.prod(rest)) if self.transposed else (math.prod(rest), first)

    def features(self, weight: Tensor) -> tuple[int, int]:
        """``(in_features, out_features)`` of the rows that the pair adapts."""
        in_features, out_features = self.full_features(weight)
        return in_features, out_features if self.rows is None else self.rows.count()

    def stack(self, weight: Tensor) -> tuple[int, ...]:
        """``(experts,)`` if there is one pair per expert, else empty."""
        return tuple(shape_of(weight)[:1]) if self.stacked else ()

    def place_rows(self, B: Tensor, out_features: int) -> Tensor:
        """``B`` as ``(out_features, r)``, zero in the rows that are not adapted; unchanged if it has that shape."""
        return B if self.rows is None or len(B) == out_features else self.rows.place(B, out_features)

    def factors(self, A: Tensor, B: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices, or stacks of them, whose product is ``B A`` with the rows of :func:`matrices`."""
        B = self.place_rows(B, self.full_features(weight)[1])
        return (A.mT, B.mT) if self.transposed else (B, A)

    def region(self, weight: Tensor) -> tuple[slice, slice, slice]:
        """The experts, the rows and the columns of the full ``weight`` that are on this rank.

        Raises:
            ValueError: if it is sharded along a dimension of a convolution's kernel.
        """
        shard, sizes = shard_region(weight), weight.shape
        experts, shard, sizes = (shard[0], shard[1:], sizes[1:]) if self.stacked else (slice(0, 1), shard, sizes)
        rows, *rest = shard
        if len(rest) == 1:
            return experts, rows, rest[0]
        if any(columns != slice(0, size) for columns, size in zip(rest, sizes[1:], strict=True)):
            raise ValueError(
                f"A weight of shape {tuple(weight.shape)} is sharded along a dimension other than the first: LoRA "
                "merges into rows. Leave out `shard_placement_fn` for it, or keep `merge=False`."
            )
        return experts, rows, slice(0, math.prod(sizes[1:]))

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """The matrices in ``weight``, contiguous for any memory format: the same memory where it is so already."""
        matrices = weight.flatten(2) if self.stacked else weight.flatten(1).unsqueeze(0)
        return [matrix.contiguous() for matrix in matrices]


def separate_rows(parts: list[WeightPart]) -> list[Rows | None]:
    """The rows of each of ``parts``, ``None`` for all of a weight; an empty list if they cannot be summed one by one.

    Example:
        >>> separate_rows([WeightPart("qkv", "q", Rows(0, 2)), WeightPart("qkv", "v", Rows(4, 6))])
        [Rows(start=0, stop=2, blocks=1), Rows(start=4, stop=6, blocks=1)]
        >>> separate_rows([WeightPart(), WeightPart()])  # of two adapters
        []
    """
    rows = [part.rows for part in parts]
    if len(parts) == 1 and parts[0] == WeightPart(parts[0].key, parts[0].name):
        return rows
    edges = sorted((each.start, each.stop) for each in rows if each is not None and each.blocks == 1)
    is_plain = all(part == WeightPart(part.key, part.name, part.rows) for part in parts)
    have_none_in_common = all(stop <= start for (_, stop), (start, _) in pairwise(edges))
    return rows if len(edges) == len(parts) and is_plain and have_none_in_common else []
