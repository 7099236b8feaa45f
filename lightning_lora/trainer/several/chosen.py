"""The adapters that a batch chooses: set before its step, in effect until it ends, its backward passes included."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_lora.layers.restoring import Undo
from lightning_lora.model.record import is_merged
from lightning_lora.model.several.acting import choose
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.several.route import Route


class ChosenAdapters:
    """Chooses the adapters of one batch after the other.

    Args:
        module: the module of the run.
        route: reads the names in a batch.
        strengths: of kept adapters that act on every sample.
        trained: the adapters that train.

    Attributes:
        present: adapters that get a gradient of zeros where no sample uses them.
        names: what the present batch chooses.
        evaluated: the adapters that evaluation chose so far.
    """

    def __init__(
        self, module: nn.Module, route: Route, strengths: Mapping[str, float], trained: Collection[str]
    ) -> None:
        self.module, self.route, self.trained = module, route, trained
        self.present: Collection[str] = ()
        self.strengths = {name: strength for name, strength in strengths.items() if strength}
        self.names: str | list[str] = []
        self.evaluated: set[str] = set()
        self.undo: Undo = []
        self.has_warned = False

    def begin(self, batch: Any, dataloader_idx: int = 0, trains: bool = False) -> None:
        """Choose the adapters of ``batch``.

        Raises:
            ValueError: if its entry is missing or wrong.
        """
        self.end()
        if is_merged(self.module):
            self._warn_of_merged()
            return
        self.names = self.route.names_in(batch, dataloader_idx)
        different = {self.names} if isinstance(self.names, str) else set(self.names)
        if not trains:
            self.evaluated |= different
        one_for_all = isinstance(self.names, str)
        each = [{**self.strengths, name: 1.0} for name in ([self.names] if one_for_all else self.names)]
        choose(self.module, each[0] if one_for_all else each, self.undo, self._present(different) if trains else ())

    def _present(self, chosen: set[str]) -> Collection[str]:
        """As ``present``, and all that train where only kept adapters are chosen: a loss needs a gradient."""
        return self.present if chosen & set(self.trained) else self.trained

    def end(self) -> None:
        """Let everything act as before the batch."""
        self.names = []
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def _warn_of_merged(self) -> None:
        if not self.has_warned:
            self.has_warned = True
            rank_zero_warn(
                f"`route={self.route.key!r}` has no effect: adapters are merged into the module, which computes the "
                "same for every sample. To choose by sample give `ckpt_path`, or call `unmerge_lora(module)`."
            )
