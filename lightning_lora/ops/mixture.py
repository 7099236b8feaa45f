"""Which pairs each sample of a batch uses, and the pairs side by side for products with all samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Mixture:
    """The coefficients of several pairs for each sample of a batch, in the forms in which products read them.

    Args:
        samples: for each sample the coefficients of all pairs; 0 for a pair that it does not use.
        device: of the tables.

    Attributes:
        size: the number of samples.
        slots: the most pairs that one sample uses, at least 1.
        factors: a pair and a coefficient; these are distinct.
        rows: for each slot of each sample the index in ``factors``; of an empty slot their number.
        has_empty_slots: whether there is such a slot.
    """

    def __init__(self, samples: Sequence[Sequence[float]], device: torch.device) -> None:
        used = [[(pair, c) for pair, c in enumerate(sample) if c] for sample in samples]
        self.samples, self.device = samples, device
        self.size, self.pairs = len(samples), len(samples[0])
        self.slots = max(1, *map(len, used)) if len(used) > 1 else max(1, len(used[0]))
        self.factors = list(dict.fromkeys(factor for sample in used for factor in sample))
        places = {factor: row for row, factor in enumerate(self.factors)}
        empty = len(self.factors)
        rows = [[*map(places.__getitem__, sample), *[empty] * (self.slots - len(sample))] for sample in used]
        self._rows = [row for sample in rows for row in sample]
        self.has_empty_slots = empty in self._rows
        self.rows = torch.tensor(self._rows).to(device, non_blocking=True)
        self._made: dict[object, Tensor] = {}

    def of_slots(self, dtype: torch.dtype, weighed: bool) -> Tensor:
        """The sums over slots, ``(pairs, samples * slots)``: 1 or the coefficient where the pair is in the slot."""
        key = "slots", dtype, weighed
        if key not in self._made:
            sums = torch.zeros(self.pairs, len(self._rows), dtype=torch.float64)
            for column, row in enumerate(self._rows):
                if row < len(self.factors):
                    pair, c = self.factors[row]
                    sums[pair, column] = c if weighed else 1.0
            self._made[key] = sums.to(self.device, dtype)
        return self._made[key]

    def of_samples(self, dtype: torch.dtype) -> Tensor:
        """The coefficients, ``(samples, pairs)``."""
        key = "samples", dtype
        if key not in self._made:
            self._made[key] = torch.tensor(self.samples, dtype=torch.float64).to(self.device, dtype)
        return self._made[key]

    def column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """``values`` on the device, ``(len(values), 1, 1)``."""
        key = "column", dtype, tuple(values)
        if key not in self._made:
            self._made[key] = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1).to(self.device, dtype)
        return self._made[key]


def side_by_side(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """``matrices`` as one tensor, ``(n, rows, columns)``; those that are shorter in dimension ``dim`` end in zeros."""
    longest = max(matrix.shape[dim] for matrix in matrices)
    if all(matrix.shape[dim] == longest for matrix in matrices):
        return torch.stack(list(matrices))
    shape = list(matrices[0].shape)
    shape[dim] = longest
    total = matrices[0].new_zeros(len(matrices), *shape)
    for place, matrix in zip(total, matrices, strict=True):
        place.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return total


class BySample:
    """Products with A and B of each sample: every sample is a group of rows of its own.

    A and B are copied for each sample, which costs less than the product where a sample has many positions.
    """

    def __init__(
        self, mixture: Mixture, every_A: Sequence[Tensor], every_B: Sequence[Tensor], scales: Any, dtype: torch.dtype
    ) -> None:
        self.mixture, self.scales, self.groups = mixture, scales, mixture.size
        pairs = [pair for pair, _ in mixture.factors]
        self.stacked_A = self._cast(
            side_by_side([every_A[pair] for pair in pairs], 0), [c * scales[pair] for pair, c in mixture.factors], dtype
        )
        self.stacked_B = self._cast(side_by_side([every_B[pair] for pair in pairs], 1), [1.0] * len(pairs), dtype)

    def _cast(self, stacked: Tensor, factors: list[float], dtype: torch.dtype) -> Tensor:
        n, rows, columns = stacked.shape
        total = stacked.new_empty(n + self.mixture.has_empty_slots, rows, columns, dtype=dtype)
        if set(factors) == {1.0}:
            total[:n].copy_(stacked)
        elif len(set(factors)) == 1:
            torch.mul(stacked, factors[0], out=total[:n])
        else:
            torch.mul(stacked, self.mixture.column(factors, stacked.dtype), out=total[:n])
        total[n:].zero_()
        return total

    def A(self) -> Tensor:
        """A times c and the scale, ``(samples, slots * r, in_features)``."""
        gathered = self.stacked_A.index_select(0, self.mixture.rows)
        return gathered.view(self.groups, -1, gathered.shape[-1])

    def B(self) -> Tensor:
        """``(samples, out_features, slots * r)``."""
        gathered = self.stacked_B.index_select(0, self.mixture.rows)
        if self.mixture.slots == 1:
            return gathered
        return gathered.view(self.groups, self.mixture.slots, *gathered.shape[1:]).transpose(1, 2).flatten(2)

    def weigh_(self, hidden: Tensor) -> Tensor:
        """``hidden``: A has the coefficients."""
        return hidden

    def gradients_of_A(self, total: Tensor) -> Tensor:
        """The gradients of each A, by that of :meth:`A` without the coefficients, ``(pairs, r, in_features)``."""
        slots = total.view(self.groups * self.mixture.slots, -1)
        sums = self.mixture.of_slots(total.dtype, weighed=True)
        dA = (sums @ slots).view(self.mixture.pairs, -1, total.shape[-1])
        return scaled_by(dA, self.scales, self.mixture)

    def gradients_of_B(self, total: Tensor) -> Tensor:
        """The gradients of each B, by that of :meth:`B`, ``(pairs, out_features, r)``."""
        slots, out_features = self.mixture.slots, total.shape[1]
        if slots > 1:
            total = total.view(self.groups, out_features, slots, -1).transpose(1, 2)
        sums = self.mixture.of_slots(total.dtype, weighed=False)
        return (sums @ total.reshape(self.groups * slots, -1)).view(self.mixture.pairs, out_features, -1)


class Stacked:
    """Products with A and B of all pairs side by side: all rows are one group, and coefficients act on ``A x``.

    Every row is multiplied with every pair, which costs less than a copy of the pairs for each sample where samples
    have few positions, or pairs are few.
    """

    groups = 1

    def __init__(
        self, mixture: Mixture, every_A: Sequence[Tensor], every_B: Sequence[Tensor], scales: Any, dtype: torch.dtype
    ) -> None:
        self.mixture, self.scales = mixture, scales
        stacked_A, stacked_B = side_by_side(every_A, 0), side_by_side(every_B, 1)
        cast_A = torch.empty_like(stacked_A, dtype=dtype)
        torch.mul(stacked_A, mixture.column(scales, stacked_A.dtype), out=cast_A)
        self.stacked_A = cast_A.flatten(0, 1).unsqueeze(0)
        self.stacked_B = stacked_B.to(dtype).transpose(0, 1).flatten(1).unsqueeze(0)

    def A(self) -> Tensor:
        """A times the scale, ``(1, pairs * r, in_features)``."""
        return self.stacked_A

    def B(self) -> Tensor:
        """``(1, out_features, pairs * r)``."""
        return self.stacked_B

    def weigh_(self, hidden: Tensor) -> Tensor:
        """``c * hidden`` in place, for ``hidden`` of shape ``(1, rows, pairs * r)``."""
        mixture = self.mixture
        hidden.view(mixture.size, -1, mixture.pairs, hidden.shape[-1] // mixture.pairs).mul_(
            mixture.of_samples(torch.promote_types(hidden.dtype, torch.float32)).view(mixture.size, 1, mixture.pairs, 1)
        )
        return hidden

    def gradients_of_A(self, total: Tensor) -> Tensor:
        """As of :class:`BySample`."""
        dA = total.view(self.mixture.pairs, -1, total.shape[-1])
        return scaled_by(dA, self.scales, self.mixture)

    def gradients_of_B(self, total: Tensor) -> Tensor:
        """As of :class:`BySample`."""
        return total.view(total.shape[1], self.mixture.pairs, -1).transpose(0, 1).contiguous()


def scaled_by(stacked: Tensor, scales: Sequence[float], mixture: Mixture) -> Tensor:
    """Each matrix of ``stacked`` times its scale, in place."""
    if len(set(scales)) > 1:
        return stacked.mul_(mixture.column(scales, stacked.dtype))
    return stacked if scales[0] == 1 else stacked.mul_(scales[0])
