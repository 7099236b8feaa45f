"""Task embeddings: each token or sample belongs to a segment, whose embedding is added to a bottleneck's input.

The segments of a batch are no argument of the modules that have bottlenecks. So they hold for the thread that sets
them, and under activation checkpointing the second forward of a module takes those of its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.adapted import adapted_modules, added_to
from lightning_lora.layers.choice import Acting, Held
from lightning_lora.layers.restoring import Restoring, Undo

Index = Tensor | Sequence[Any] | int


class Segments(Held):
    """The segments of one batch.

    Args:
        index: of the segment: ``()`` for the whole batch, ``(batch,)``, or of the shape of the tokens; ``None`` for no
            embedding.
    """

    def __init__(self, index: Tensor | None) -> None:
        super().__init__()
        self.index = index


class ActingSegments(Acting):
    """The segments that hold now in each thread, one object for all bottlenecks of a model.

    Args:
        count: the number of segments.
        is_ambiguous: whether the model has modules whose first dimension is not the batch.
    """

    def __init__(self, count: int, is_ambiguous: bool) -> None:
        super().__init__()
        self.count, self.is_ambiguous = count, is_ambiguous

    def __reduce__(self) -> Any:
        return ActingSegments, (self.count, self.is_ambiguous)

    def begin(self, choice: Any) -> None:
        """Let these segments hold in this thread."""
        super().begin(choice)
        self._thread.table = choice.index

    def end(self, choice: Any) -> None:
        """Let these segments hold no longer."""
        super().end(choice)
        before: Any = self.choice
        self._thread.table = None if before is None else before.index

    def index(self, site: str) -> Tensor | None:
        """The segments of the call that runs now.

        Args:
            site: the name of the module, for errors.

        Raises:
            RuntimeError: if none were given.
        """
        if torch.compiler.is_compiling() and self.table is not None:
            return self.table
        segments: Any = self.now()
        if segments is None:
            raise RuntimeError(
                f"`{site}` has task embeddings, and this call has no segments. Call the model inside `with "
                "use_segments(model, index)`, or name the entry of the batch in the `segments` of AdapterCallback."
            )
        index: Tensor | None = segments.index
        return index

    def embedded(self, embedding: Tensor, x: Tensor, site: str) -> Tensor:
        """``x`` and the embedding of each of its segments.

        Args:
            embedding: ``(count, features)``.
            x: ``(..., features)``.
            site: the name of the module, for errors.

        Raises:
            RuntimeError: if none were given.
            ValueError: if the segments do not fit ``x``.
        """
        index = self.index(site)
        if index is None:
            return x
        places = x.shape[:-1]
        if index.dim() and index.shape != places and not self._fits_samples(index, places):
            raise ValueError(
                f"`{site}` gets an input of shape {tuple(x.shape)}, and the segments have shape {tuple(index.shape)}: "
                f"they must be one number, {places[:1]} for each sample or {places} for each token."
            )
        if self.is_ambiguous and index.dim() and x.dim() > 2 and places[0] == places[1]:
            raise ValueError(
                f"`{site}` gets an input of shape {tuple(x.shape)}, and the model has modules with batch_first=False, "
                "so either dimension may be the batch. Use batch_first=True."
            )
        added = embedding.to(x.dtype)[index.to(x.device)]
        return x + (added if added.dim() in (1, x.dim()) else added.view(len(added), *[1] * (x.dim() - 2), -1))

    @staticmethod
    def _fits_samples(index: Tensor, places: torch.Size) -> bool:
        return index.dim() == 1 and len(places) > 1 and len(index) == places[0]


def connect(bottlenecks: Sequence[Any], count: int, is_ambiguous: bool) -> None:
    """Let ``bottlenecks`` read the segments in one place."""
    present = next((each.acting for each in bottlenecks if each.acting is not None), None)
    acting = ActingSegments(count, is_ambiguous) if present is None else present
    for bottleneck in bottlenecks:
        bottleneck.acting = acting


def use_segments(model: nn.Module, index: Index | None) -> AbstractContextManager[None]:
    """Inside the ``with`` block each token or sample belongs to the segment of its ``index``, whose embedding is added.

    For models with bottlenecks that have task embeddings (``segment_count``). Blocks nest, and hold for the thread that
    entered them. Backward may run outside. AdapterCallback does the same for each batch of a run.

    Args:
        model: any module, or any part of one, that is adapted by BottleneckConfig with ``segment_count``.
        index: integers from 0 to ``segment_count - 1``: one for the whole batch, one for each sample ``(batch,)``, or
            one for each token ``(batch, length)``; ``None`` adds no embedding.

    Raises:
        ValueError: if ``model`` has no task embeddings, or an index is out of range (a tensor on another device than
            the CPU is not checked); and in the forward pass, if it does not fit the input.
        TypeError: if the indices are no integers.

    Source: Lin et al. 2020 (arXiv 2004.03829), "task embedding".

    Example:
        >>> from lightning_lora import BottleneckConfig, adapt
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])})
        >>> adapt(model, BottleneckConfig(size=2, placement="block", segment_count=3))
        ['layers.0']
        >>> with use_segments(model, [[0, 0, 1, 2]]):
        ...     y = model["layers"][0](torch.ones(1, 4, 8))
    """
    return Restoring(partial(_use, model, index))


def _use(model: nn.Module, index: Index | None, undo: Undo) -> None:
    acting = acting_in(model)
    if acting is None:
        raise ValueError(
            "`model` has no task embeddings. Adapt it by BottleneckConfig(placement='block', segment_count=...)."
        )
    set_segments(acting, index, undo)


def set_segments(acting: ActingSegments, index: Index | None, undo: Undo) -> None:
    """As on entry of :func:`use_segments`; ``undo`` gets the function that undoes it."""
    segments = Segments(None if index is None else _checked(index, acting.count))
    undo.append(partial(acting.end, segments))
    acting.begin(segments)


def acting_in(model: nn.Module) -> ActingSegments | None:
    """What the bottlenecks of ``model`` read their segments from; ``None`` if they have no embeddings."""
    every = (getattr(added_to(module), "acting", None) for _, module in adapted_modules(model))
    return next((acting for acting in every if isinstance(acting, ActingSegments)), None)


def _checked(index: Index, count: int) -> Tensor:
    try:
        tensor = torch.as_tensor(index)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Segments must be integers in one tensor or nested lists, but got {index!r:.80}.") from error
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"Segments must be integers, but got {tensor.dtype}.")
    if tensor.device.type == "cpu" and tensor.numel():
        least, most = tensor.aminmax()
        if least < 0 or most >= count:
            wrong = int(least if least < 0 else most)
            raise ValueError(f"Segments must be from 0 to {count - 1} (`segment_count={count}`), but got {wrong}.")
    return tensor.long()
