"""``route``: the entry of a batch that says which adapter each of its samples uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_lora.names import nearest
from lightning_lora.trainer.batches.entry import entry_of

DATALOADER = "dataloader"  # in evaluation, the index of the data loader takes the place of an entry


class Route:
    """Reads the names of adapters in a batch.

    Args:
        key: a key of the batch, an attribute, an index of a sequence, or ``"dataloader"``.
        names: of the adapters, in the order of their indices.

    Example:
        >>> Route("task", ["fr", "de"]).names_in({"x": [1.0, 2.0], "task": [1, "fr"]})
        ['de', 'fr']
    """

    def __init__(self, key: str | int, names: Sequence[str]) -> None:
        self.key, self.names = key, list(names)

    def names_in(self, batch: Any, dataloader_idx: int = 0) -> str | list[str]:
        """The adapter of each sample, or the one of the whole batch.

        Args:
            batch: as the step gets it.
            dataloader_idx: the index of its data loader.

        Raises:
            ValueError: if the batch has no such entry, the entry names no adapter of the run, or it is not as long as
                the batch.
        """
        if self.key == DATALOADER:
            return self._name_of(dataloader_idx, "this data loader")
        entry = entry_of(batch, self.key, "route")
        values = entry.tolist() if hasattr(entry, "tolist") else entry
        if isinstance(values, (str, int)):
            return self._name_of(values, "the batch")
        if not isinstance(values, Sequence):
            raise ValueError(f"`route={self.key!r}` must give names or indices of adapters, but got {_short(values)}.")
        names = [self._name_of(value, f"sample {place} of the batch") for place, value in enumerate(values)]
        sizes = set(_sizes(batch, entry))
        if not names or (sizes and len(names) not in sizes):
            raise ValueError(
                f"`route={self.key!r}` must give one adapter for the whole batch or one for each sample, but gives "
                f"{len(names)} in a batch of {' or '.join(map(str, sorted(sizes))) or 'no'} samples."
            )
        return names

    def _name_of(self, value: Any, where: str) -> str:
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return self.names[value]
        if isinstance(value, str) and value in self.names:
            return value
        close = nearest(value, self.names) if isinstance(value, str) else self.names
        raise ValueError(
            f"`route={self.key!r}` gives {_short(value)} for {where}, which is no adapter of this run. It has "
            f"{', '.join(f'`{name}`' for name in close)}"
            + ("." if isinstance(value, str) else f", with the indices 0 to {len(self.names) - 1}.")
        )


def _sizes(batch: Any, entry: Any) -> Iterator[int]:
    """The possible numbers of samples: the first dimension of every tensor, but for the ``entry`` itself."""
    if batch is entry:
        return
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch.shape[0]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value, entry)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(value, entry)
    elif hasattr(batch, "__dict__"):
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                yield from _sizes(value, entry)


def _short(value: Any) -> str:
    return f"{value!r:.80}"
