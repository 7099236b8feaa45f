"""Which pairs each sample of a batch uses, and with which coefficients, as tensors for the products of all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Mixture:
    """The coefficients of several pairs for each sample of a batch.

    Args:
        samples: for each sample the coefficients of all pairs; 0 for a pair that it does not use.
        device: of the tables.

    Attributes:
        size: the number of samples.
        pairs: the number of pairs.
        slots: the most pairs that one sample uses, at least 1.
        is_used: whether a sample uses a pair.
        rows: for each slot of each sample the index of a pair; of an empty slot the number of pairs.
        has_empty_slots: whether there is such a slot.
    """

    def __init__(self, samples: Sequence[Sequence[float]], device: torch.device) -> None:
        used = [[pair for pair, c in enumerate(sample) if c] for sample in samples]
        self.samples, self.device = samples, device
        self.size, self.pairs = len(samples), len(samples[0])
        self.slots, self.is_used = max([1, *map(len, used)]), any(used)
        self._rows = [row for pairs in used for row in [*pairs, *[self.pairs] * (self.slots - len(pairs))]]
        self.has_empty_slots = self.pairs in self._rows
        self.rows = on_device(lambda: torch.tensor(self._rows), device)
        self._made: dict[object, Tensor | None] = {}
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

    def of_samples(self, dtype: torch.dtype) -> Tensor:
        """The coefficients, ``(samples, 1, pairs, 1)``."""
        shape = (self.size, 1, self.pairs, 1)
        table = self._table(("samples", dtype), dtype, lambda: torch.tensor(self.samples, dtype=torch.float64))
        return table.view(shape)

    def of_ranks(self, scales: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Coefficients times ``scales`` for each row of every A, ``(samples, 1, sum(ranks))``."""

        def make() -> Tensor:
            values = torch.tensor(self.samples, dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)
            return values.repeat_interleave(torch.tensor(ranks), 1).unsqueeze(1)

        return self._table(("ranks", scales, ranks, dtype), dtype, make)

    def of_slots(self, scales: tuple[float, ...], r: int, dtype: torch.dtype) -> Tensor | None:
        """Coefficients times ``scales`` for ``r`` rows of each slot, ``(samples, 1, slots * r)``; ``None`` for ones."""
        key = ("slots", scales, r, dtype)
        if key not in self._made:
            factors = [c * scale for sample in self.samples for c, scale in zip(sample, scales, strict=True) if c]
            if set(factors) <= {1.0}:
                self._made[key] = None
                return None
            places = iter(factors)
            values = [0.0 if row == self.pairs else next(places) for row in self._rows]
            shape = (self.size, 1, self.slots * r)
            self._table(key, dtype, lambda: torch.tensor(values, dtype=torch.float64).repeat_interleave(r).view(shape))
        return self._made[key]

    def sums(self, dtype: torch.dtype) -> Tensor:
        """The sums over the slots of each pair, ``(pairs, samples * slots)``: 1 where the pair is in the slot."""

        def make() -> Tensor:
            return torch.arange(self.pairs).unsqueeze(1) == torch.tensor(self._rows)

        return self._table(("sums", dtype), dtype, make)

    def _table(self, key: object, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        table = self._made.get(key)
        if table is None:
            table = self._made[key] = on_device(make, self.device, dtype)
        return table


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
