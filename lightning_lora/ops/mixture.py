"""Which pairs each sample of a batch uses, and the pairs side by side for products with all samples at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


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
        self.slots = max([1, *map(len, used)])
        self.factors = list(dict.fromkeys(factor for sample in used for factor in sample))
        places = {factor: row for row, factor in enumerate(self.factors)}
        empty = len(self.factors)
        rows = [[*map(places.__getitem__, sample), *[empty] * (self.slots - len(sample))] for sample in used]
        self._rows = [row for sample in rows for row in sample]
        self.has_empty_slots = empty in self._rows
        self.rows = on_device(lambda: torch.tensor(self._rows), device)
        self._made: dict[object, Tensor] = {}
        self._waves: dict[torch.dtype, list[Wave]] = {}

    def waves(self, dtype: torch.dtype) -> list[Wave]:
        """The pairs in their order, as many at once as have no sample in common; coefficients in ``dtype``."""
        if dtype not in self._waves:
            waves: list[list[int]] = []
            for pair in range(self.pairs):
                taken = {sample for each in waves[-1] for sample in self._users(each)} if waves else set()
                if waves and taken.isdisjoint(self._users(pair)):
                    waves[-1].append(pair)
                else:
                    waves.append([pair])
            with torch.inference_mode(False):
                self._waves[dtype] = [Wave([self._user(pair, dtype) for pair in wave]) for wave in waves]
        return self._waves[dtype]

    def _users(self, pair: int) -> list[int]:
        return [index for index, sample in enumerate(self.samples) if sample[pair]]

    def _user(self, pair: int, dtype: torch.dtype) -> tuple[int, Tensor, Tensor | float | None]:
        users = self._users(pair)
        values = [self.samples[index][pair] for index in users]
        factor: Tensor | float | None = values[0] if values and values[0] != 1 else None
        if len(set(values)) > 1:
            factor = torch.tensor(values, dtype=torch.float64).to(self.device, dtype, non_blocking=True)
        return pair, torch.tensor(users, dtype=torch.long).to(self.device, non_blocking=True), factor

    def of_slots(self, dtype: torch.dtype, weighed: bool) -> Tensor:
        """The sums over slots, ``(pairs, samples * slots)``: 1 or the coefficient where the pair is in the slot."""
        key = "slots", dtype, weighed
        if key not in self._made:
            sums = [[0.0] * len(self._rows) for _ in range(self.pairs)]
            for column, row in enumerate(self._rows):
                if row < len(self.factors):
                    pair, c = self.factors[row]
                    sums[pair][column] = c if weighed else 1.0
            self._made[key] = on_device(partial(torch.tensor, sums, dtype=torch.float64), self.device, dtype)
        return self._made[key]

    def of_samples(self, dtype: torch.dtype) -> Tensor:
        """The coefficients, ``(samples, 1, pairs, 1)``."""
        key = "samples", dtype
        if key not in self._made:
            shape = (self.size, 1, self.pairs, 1)
            values = partial(torch.tensor, self.samples, dtype=torch.float64)
            self._made[key] = on_device(values, self.device, dtype).view(shape)
        return self._made[key]

    def column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """``values`` on the device, ``(len(values), 1, 1)``."""
        key = "column", dtype, tuple(values)
        if key not in self._made:
            column = partial(torch.tensor, values, dtype=torch.float64)
            self._made[key] = on_device(column, self.device, dtype).view(-1, 1, 1)
        return self._made[key]


def on_device(make: Callable[[], Tensor], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """What ``make`` gives, on ``device``; no inference tensor in any case, as a later forward may need gradients."""
    with torch.inference_mode(False):
        return make().to(device, dtype, non_blocking=True)


class Wave:
    """Pairs that have no sample in common.

    Args:
        users: a pair, the indices of its samples, and their coefficients: one number, a tensor, or ``None`` for 1.
    """

    def __init__(self, users: list[tuple[int, Tensor, Tensor | float | None]]) -> None:
        self.users = users
        self.rows = torch.cat([rows for _, rows, _ in users])

    def put(self, y: Tensor, dim: int, parts: Sequence[Tensor]) -> Tensor:
        """``y`` with the rows of each pair's samples replaced."""
        return y.index_copy(dim, self.rows, torch.cat(list(parts), dim) if len(parts) > 1 else parts[0])


class PairsInGroups(ABC):
    """A and B of several pairs in one tensor each, as products with groups of rows read them.

    Args:
        mixture: which samples use which pairs.
        every_A: of each pair, ``(r, in_features)``; r may differ.
        every_B: of each pair, ``(out_features, r)``.
        scales: of each pair.
        dtype: of the products.

    Attributes:
        groups: how many groups of rows there are.
        A: times the scale, ``(groups, rank, in_features)``, where ``rank`` is that of all pairs in a group.
        B: ``(groups, out_features, rank)``.
    """

    groups: int

    def __init__(
        self,
        mixture: Mixture,
        every_A: Sequence[Tensor],
        every_B: Sequence[Tensor],
        scales: Sequence[float],
        dtype: torch.dtype,
    ) -> None:
        self.mixture, self.dtype = mixture, dtype
        self.ranks = [len(A) for A in every_A]
        self.has_one_rank = len(set(self.ranks)) == 1
        self.scale = scales[0] if len(set(scales)) == 1 else None
        self.scales = scales
        self._arrange(every_A, every_B)

    @abstractmethod
    def _arrange(self, every_A: Sequence[Tensor], every_B: Sequence[Tensor]) -> None:
        """Put A and B of every pair into tensors."""

    @property
    @abstractmethod
    def A(self) -> Tensor:
        """``(groups, rank, in_features)``."""

    @property
    @abstractmethod
    def B(self) -> Tensor:
        """``(groups, out_features, rank)``."""

    @abstractmethod
    def weigh_(self, hidden: Tensor) -> Tensor:
        """``hidden``, ``(groups, rows, rank)``, times coefficients that are not in A."""

    def gradients_of_A(self, total: Tensor) -> Sequence[Tensor]:
        """The gradient of each A by that of :attr:`A`; coefficients are in it only if :meth:`weigh_` applies them."""
        dA = self._sum_A(total)
        if self.scale is None:
            dA.mul_(self.mixture.column(self.scales, dA.dtype))
        elif self.scale != 1:
            dA.mul_(self.scale)
        return dA.unbind() if self.has_one_rank else [each[:r] for each, r in zip(dA, self.ranks, strict=True)]

    def gradients_of_B(self, total: Tensor) -> Sequence[Tensor]:
        """The gradient of each B by that of :attr:`B`."""
        dB = self._sum_B(total)
        return dB.unbind() if self.has_one_rank else [each[:, :r] for each, r in zip(dB, self.ranks, strict=True)]

    @abstractmethod
    def _sum_A(self, total: Tensor) -> Tensor:
        """The gradients of every A by ``total``, that of :attr:`A`: ``(pairs, ...)``."""

    @abstractmethod
    def _sum_B(self, total: Tensor) -> Tensor:
        """The gradients of every B by ``total``, that of :attr:`B`: ``(pairs, ...)``."""

    def _side_by_side(self, matrices: Sequence[Tensor], dim: int) -> Tensor:
        """``matrices`` as one tensor, ``(n, rows, columns)``; lower ranks, in dimension ``dim``, end in zeros."""
        if self.has_one_rank:
            return torch.stack(list(matrices))
        shape = list(matrices[0].shape)
        shape[dim] = max(self.ranks)
        total = matrices[0].new_zeros(len(matrices), *shape)
        for place, matrix in zip(total, matrices, strict=True):
            place.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
        return total

    def _scaled(self, stacked: Tensor, factors: Sequence[float]) -> Tensor:
        """Each matrix times its factor in :attr:`dtype`, rounded once."""
        if set(factors) == {1.0}:
            return stacked.to(self.dtype)
        total = torch.empty_like(stacked, dtype=self.dtype)
        return torch.mul(stacked, self.mixture.column(factors, stacked.dtype), out=total)


class BySample(PairsInGroups):
    """Every sample is a group of rows of its own, with copies of the pairs that it uses.

    The copies cost less than the products where a sample has many positions.
    """

    def _arrange(self, every_A: Sequence[Tensor], every_B: Sequence[Tensor]) -> None:
        self.groups, factors = self.mixture.size, self.mixture.factors
        scales = [c * self.scales[pair] for pair, c in factors]
        self.stacked_A = self._scaled(self._side_by_side([every_A[pair] for pair, _ in factors], 0), scales)
        self.stacked_B = self._side_by_side([every_B[pair] for pair, _ in factors], 1).to(self.dtype)
        if self.mixture.has_empty_slots:
            self.stacked_A, self.stacked_B = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (self.stacked_A, self.stacked_B))

    @property
    def A(self) -> Tensor:
        """Times the coefficients, too."""
        gathered = self.stacked_A.index_select(0, self.mixture.rows)
        return gathered if self.mixture.slots == 1 else gathered.view(self.groups, -1, gathered.shape[-1])

    @property
    def B(self) -> Tensor:
        """As of :class:`PairsInGroups`."""
        gathered = self.stacked_B.index_select(0, self.mixture.rows)
        if self.mixture.slots == 1:
            return gathered
        return gathered.view(self.groups, self.mixture.slots, *gathered.shape[1:]).transpose(1, 2).flatten(2)

    def weigh_(self, hidden: Tensor) -> Tensor:
        """``hidden`` as it is."""
        return hidden

    def _sum_A(self, total: Tensor) -> Tensor:
        slots = total.view(self.groups * self.mixture.slots, -1)
        sums = self.mixture.of_slots(total.dtype, weighed=True)
        return (sums @ slots).view(self.mixture.pairs, -1, total.shape[-1])

    def _sum_B(self, total: Tensor) -> Tensor:
        slots, out_features = self.mixture.slots, total.shape[1]
        if slots > 1:
            total = total.view(self.groups, out_features, slots, -1).transpose(1, 2)
        sums = self.mixture.of_slots(total.dtype, weighed=False)
        return (sums @ total.reshape(self.groups * slots, -1)).view(self.mixture.pairs, out_features, -1)


class Stacked(PairsInGroups):
    """All rows are one group, which is multiplied with all pairs; coefficients act on ``A x``.

    This costs less than copies of the pairs for each sample where samples have few positions, or pairs are few. Unlike
    copies it lets values of a pair that are not finite reach every sample, as NaN.
    """

    groups = 1

    def _arrange(self, every_A: Sequence[Tensor], every_B: Sequence[Tensor]) -> None:
        self.stacked_A = self._scaled(self._side_by_side(every_A, 0), self.scales).flatten(0, 1).unsqueeze(0)
        every_B = every_B if self.has_one_rank else list(self._side_by_side(every_B, 1))
        self.stacked_B = torch.cat(list(every_B), 1).to(self.dtype).unsqueeze(0)

    @property
    def A(self) -> Tensor:
        """As of :class:`PairsInGroups`."""
        return self.stacked_A

    @property
    def B(self) -> Tensor:
        """As of :class:`PairsInGroups`."""
        return self.stacked_B

    def weigh_(self, hidden: Tensor) -> Tensor:
        """``c * hidden``, in place."""
        mixture = self.mixture
        c = mixture.of_samples(torch.promote_types(hidden.dtype, torch.float32))
        hidden.view(mixture.size, -1, mixture.pairs, max(self.ranks)).mul_(c)
        return hidden

    def _sum_A(self, total: Tensor) -> Tensor:
        return total.view(self.mixture.pairs, -1, total.shape[-1])

    def _sum_B(self, total: Tensor) -> Tensor:
        return total.view(total.shape[1], self.mixture.pairs, -1).transpose(0, 1).contiguous()
