"""What a run watches in its first steps: that adapters train, that the base is complete, and that it stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lora.model.initial_values import renew
from lightning_lora.trainer.checkpointing.checkpoint_io import CheckpointFiles
from lightning_lora.trainer.imports import rank_zero_warn
from lightning_lora.trainer.optimizers import OptimizerSnapshot
from lightning_lora.trainer.replaced_layers import warn_of_lost
from lightning_lora.trainer.watching.frozen_watch import FrozenWatch
from lightning_lora.trainer.watching.liveness import Liveness
from lightning_lora.trainer.watching.nothing_trains import refuse_loss
from lightning_lora.trainer.watching.start_of_training import StartOfTraining, has_start_hooks


class FirstSteps:
    """The watches of one run.

    Args:
        trainer: the Trainer.
        files: of the run.
        watches_gradients: whether the strategy lets gradients be seen.
        was_bare: whether the module came into the run without adapters.

    Attributes:
        lost: the layers whose adapters a hook of the module replaced by others.
        named: the adapted layers that a warning named already.
        snapshots: of the optimizers, as the user made them.
        liveness: the watch over the adapters, from the start of training on.
    """

    def __init__(self, trainer: Any, files: CheckpointFiles, watches_gradients: bool, was_bare: bool) -> None:
        self.trainer, self.files, self.module, self.method = trainer, files, files.module, files.method
        self.watches_gradients, self.was_bare = watches_gradients, was_bare
        self.lost: set[str] = set()
        self.named: set[str] = set()
        self.snapshots: list[OptimizerSnapshot] = []
        self.liveness: Liveness | None = None

    def watch_frozen(self) -> None:
        """From the end of the strategy's set-up on, watch what is frozen."""
        if self.watches_gradients:
            self.files.frozen = FrozenWatch(self.module, self.method, self.files.base_fingerprint())
            has_hooks = has_start_hooks(self.module, self.trainer.callbacks)
            self.files.start = StartOfTraining(self.files.frozen, has_hooks)

    def warn_at_start(self) -> None:
        """Before the first step, warn of what a file would have set right."""
        if self.files.loaded:
            return
        warn_of_lost(self.lost, self.module)
        for message in self.method.warnings(self.module) if self.was_bare else ():
            rank_zero_warn(message)

    def watch(self, optimizers: list[Any]) -> None:
        """Check from here on that the adapters are alive."""
        if not self.watches_gradients or not self.files.run_config.liveness:
            return
        self.close()  # a tuner has run before
        self.liveness = Liveness(self.module, self.method.watched(self.module), self.named)
        self.liveness.check_held(optimizers)

    def close(self) -> None:
        """Take the watch off the adapters."""
        if self.liveness is not None:
            self.liveness.close()

    def begin_batch(self, index: int) -> None:
        """Take the base as of the first batch; in the first steps, compare what is frozen with it.

        Raises:
            ValueError: if a resumed run has another base.
            MisconfigurationException: if a hook tied or parametrized an adapted weight.
        """
        start = self.files.start
        if start is not None:
            self.files.start_training()
            if start.has_hooks and self.was_bare and not self.files.loaded:
                renew(self.module)
        elif self.files.frozen is not None and self.files.run_config.liveness:
            self.files.frozen.begin_batch(index)

    def check_loss(self, loss: Tensor) -> None:
        """Raise before the backward pass of a loss that depends on nothing that trains."""
        if not loss.requires_grad:
            causes = [] if self.liveness is None else [self.liveness.causes()]
            refuse_loss(self.module, self.method, self.snapshots, causes)
