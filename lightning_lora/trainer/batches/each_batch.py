"""The base of callbacks that set something for the time of each batch."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_lora.trainer.imports import pl
from lightning_lora.trainer.method_callback import MethodCallback


class EachBatchCallback(MethodCallback):
    """Calls ``begin_batch`` before the step of each batch and ``end_batch`` after it, in training and in evaluation.

    Where a step raises, ``end_batch`` is not called: what a batch sets must end with the run too.
    """

    def begin_batch(
        self, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int = 0, trains: bool = False
    ) -> None:
        """Called before the step."""
        raise NotImplementedError

    def end_batch(self) -> None:
        """Called after the step, and its backward pass."""
        raise NotImplementedError

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.begin_batch(pl_module, batch, trains=True)

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.end_batch()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.begin_batch(pl_module, batch, dataloader_idx)

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.end_batch()

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.begin_batch(pl_module, batch, dataloader_idx)

    @override
    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self.end_batch()

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.begin_batch(pl_module, batch, dataloader_idx)

    @override
    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self.end_batch()
