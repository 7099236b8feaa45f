"""The segments of each batch of a run, for bottlenecks with task embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.layers.restoring import Undo
from lightning_lora.methods.bottleneck.segments import ActingSegments, acting_in, set_segments
from lightning_lora.trainer.batches.entry import entry_of


class BatchSegments:
    """Sets the segments of one batch after the other.

    Args:
        key: of the entry in the batch.
    """

    def __init__(self, key: str | int) -> None:
        self.key = key
        self.undo: Undo = []
        self.acting: ActingSegments | None = None

    def begin(self, module: nn.Module, batch: Any) -> None:
        """Set the segments of ``batch``.

        Raises:
            ValueError: if its entry is missing, or a segment is out of range.
            TypeError: if the entry holds no integers.
        """
        self.end()
        if self.acting is None:
            self.acting = acting_in(module)
        if self.acting is not None:  # otherwise the module is plain again
            set_segments(self.acting, entry_of(batch, self.key, "segments"), self.undo)

    def end(self) -> None:
        """Take them off."""
        while self.undo:
            self.undo[-1]()
            self.undo.pop()
