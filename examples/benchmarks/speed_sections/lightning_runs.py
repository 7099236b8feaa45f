"""Runs of a Trainer, for the sections that measure through Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from speed_sections.settings import CUDA

Loss = Callable[..., Tensor]


class Network(LightningModule):
    """``network`` trained by AdamW; ``loss`` takes the network and the tensors of a batch."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(self.network, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's messages of each run."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def fit(network: nn.Module, loss: Loss, batches: list[Tensor], callbacks: list[Callback], **arguments: Any) -> None:
    """Train on ``batches``, tensors whose first dimension counts the steps."""
    data = DataLoader(TensorDataset(*batches), batch_size=None)  # a batch is an item: collating would add to each row
    with quiet():
        trainer = Trainer(
            max_epochs=1,
            callbacks=callbacks,
            accelerator="gpu" if CUDA else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
        trainer.fit(Network(network, loss), data)
