"""What a run watches in its first steps: that adapters train, that the base is complete, and that it stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lora.distributed.sharded import reshard
from lightning_lora.model.initial_values import renew
from lightning_lora.model.written import written_parameters
from lightning_lora.trainer.checkpointing.checkpoint_io import CheckpointFiles
from lightning_lora.trainer.checkpointing.init_and_export import why_not_exportable
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_warn
from lightning_lora.trainer.optimizers import OptimizerSnapshot
from lightning_lora.trainer.replaced_layers import warn_of_lost
from lightning_lora.trainer.watching.frozen_watch import MOVING, FrozenWatch
from lightning_lora.trainer.watching.kept_layers import KeptLayers
from lightning_lora.trainer.watching.liveness import Liveness
from lightning_lora.trainer.watching.lost_gradients import LostGradients
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
        moving: the frozen parameters that move, as far as ``export`` was checked with them.
        can_hold_moving: whether it can hold them.
        snapshots: of the optimizers, as the user made them.
        liveness: the watch over the adapters, from the start of training on.
        kept_layers: the watch over the adapted layers, from the start of a fit on.
    """

    def __init__(self, trainer: Any, files: CheckpointFiles, watches_gradients: bool, was_bare: bool) -> None:
        self.trainer, self.files, self.module, self.method = trainer, files, files.module, files.method
        self.watches_gradients, self.was_bare = watches_gradients, was_bare
        self.lost: set[str] = set()
        self.named: set[str] = set()
        self.moving, self.can_hold_moving = set[str](), True
        self.snapshots: list[OptimizerSnapshot] = []
        self.liveness: Liveness | None = None
        self.kept_layers: KeptLayers | None = None
        self.lost_gradients: LostGradients | None = None

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
        reshard(self.module)  # an evaluation gathered parameters, and optimizers hold the sharded ones
        self.liveness = Liveness(self.module, self.method.watched(self.module), self.named)
        self.liveness.check_held(optimizers)

    def close(self) -> None:
        """Take the watch off the adapters."""
        if self.liveness is not None:
            self.liveness.close()
        self._close_lost_gradients()

    def _close_lost_gradients(self) -> None:
        if self.lost_gradients is not None:
            self.lost_gradients.close()

    def begin_batch(self, index: int) -> None:
        """Take the base as of the first batch; in the first steps, compare what is frozen with it.

        Raises:
            ValueError: if a resumed run has another base.
            MisconfigurationException: if a hook tied or parametrized an adapted weight, or `export` cannot hold what
                moves.
        """
        start, frozen = self.files.start, self.files.frozen
        self._close_lost_gradients()
        if start is not None:
            self.lost_gradients = LostGradients(self.module, self.method)
            self.files.start_training()
            if start.has_hooks and self.was_bare and not self.files.loaded:
                renew(self.module)
            self._check_export(refuse=True)
        elif frozen is not None and self.files.run_config.liveness:
            in_first_steps = frozen.first_steps > 0
            frozen.begin_batch(index)
            if not frozen.named[MOVING] <= self.moving:
                self._check_export(refuse=in_first_steps)

    def check_layers(self) -> None:
        """Raise if an adapted layer was replaced since the start of the fit.

        Raises:
            MisconfigurationException: naming the first one.
        """
        if self.kept_layers is not None:
            self.kept_layers.check()

    def can_export(self) -> bool:
        """Whether ``export`` can hold what moves though it is frozen; where it cannot, a warning has said so."""
        self._check_export(refuse=False)
        return self.can_hold_moving

    def _check_export(self, refuse: bool) -> None:
        """See whether what moves can be exported: in the first steps an error, later there is too much to lose."""
        directory = self.files.run_config.export
        moving = set() if directory is None else {name for name, _ in written_parameters(self.module)}
        if directory is None or moving <= self.moving:
            return
        self.moving |= moving
        why_not = why_not_exportable(self.module, self.method, directory, self.moving)
        if why_not is not None and refuse:
            raise MisconfigurationException(why_not)
        self.can_hold_moving = why_not is None
        if why_not is not None:
            rank_zero_warn(why_not)

    def check_loss(self, loss: Tensor) -> None:
        """Raise before the backward pass of a loss that depends on nothing that trains."""
        if not loss.requires_grad:
            causes = [] if self.liveness is None else [self.liveness.causes()]
            refuse_loss(self.module, self.method, self.snapshots, causes)
