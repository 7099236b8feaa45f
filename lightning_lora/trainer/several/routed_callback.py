"""The hooks of a callback whose adapters may be chosen batch by batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.config import RunConfig
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.several.trained_in_addition import warning_of_changes
from lightning_lora.model.sum_groups import forget_sums
from lightning_lora.trainer.batches.each_batch import EachBatchCallback
from lightning_lora.trainer.imports import MisconfigurationException, pl, rank_zero_warn
from lightning_lora.trainer.patching import call_on_close
from lightning_lora.trainer.several.chosen import ChosenAdapters
from lightning_lora.trainer.several.gradients import AdapterGradients
from lightning_lora.trainer.several.route import DATALOADER, Route
from lightning_lora.trainer.strategies.selection import strategy_adapter_for


class RoutedCallback(EachBatchCallback):
    """Base of LoRACallback: a choice is set before a step, and holds until the batch ends.

    Args:
        method: what the module is adapted by.
        run_config: what a run does with it.
    """

    method: LoRAMethod

    def __init__(self, method: LoRAMethod, run_config: RunConfig) -> None:
        super().__init__(method, run_config)
        if run_config.merge == "best" and len(method.names) > 1:
            raise ValueError(
                f"`merge='best'` would merge {', '.join(f'`{name}`' for name in method.names)} together. To merge of "
                f"the last step say which, merge={{{method.names[0]!r}: 1.0}}; to take the best checkpoint write "
                "merge=False, and load it by load_from_checkpoint."
            )
        self._chosen: ChosenAdapters | None = None
        self._gradients: AdapterGradients | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As of the base class: what belongs to one run stays out."""
        return super().__getstate__() | {"_chosen": None, "_gradients": None}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the module, and be ready to choose."""
        route = self.run_config.route
        if route == DATALOADER and stage == "fit":
            raise MisconfigurationException(
                "`route='dataloader'` chooses by the data loader of an evaluation, and Lightning gives training_step "
                "no such index. Name an entry of the batch that training and evaluation have, such as route='task'."
            )
        if len(self.method.names) > 1 and not strategy_adapter_for(trainer.strategy, pl_module).watches_gradients:
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} gives an adapter that no sample used a gradient of zeros in its "
                "own buffers, with which Adam would move it. Train several adapters with strategy='ddp' or an FSDP "
                "strategy, or one adapter in a run."
            )
        self._chosen = self._gradients = None  # an earlier run may have ended with an error
        super().setup(trainer, pl_module, stage)
        if route is None:
            return
        assert self._run is not None
        trained, kept = self.method.names, self.method.keep
        self._chosen = ChosenAdapters(pl_module, Route(route, [*trained, *kept]), kept, trained)
        call_on_close(self._run.stack, self._chosen.end)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what changes kept adapters, and count the samples of each adapter from here on."""
        changes = warning_of_changes(pl_module) if self._run is not None else None
        if changes is not None:
            rank_zero_warn(changes)
        if self._chosen is not None and self._run is not None:
            if self._run.strategy_adapter.needs_every_gradient():
                self._chosen.present = self.method.names
            name_of = self.method.name_of_parameters(pl_module)
            sees_backward = pl_module.automatic_optimization
            self._gradients = AdapterGradients(self.method.names, name_of, self.run_config.balance, sees_backward)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the adapters of the batch, and begin to count its samples."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._gradients is not None and self._chosen is not None:
            self._gradients.begin_batch(self._chosen.names, trainer.optimizers)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count the samples of each adapter."""
        super().on_before_backward(trainer, pl_module, loss)
        if self._gradients is not None:
            self._gradients.note_backward(trainer.optimizers)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Leave no gradient to what no sample used."""
        if self._gradients is not None:
            used = self._gradients.before_step(optimizer)
            if self._liveness is not None:
                self._liveness.used = used
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep no sum of weights: other callbacks may exchange the weights for averaged ones, through ``.data``."""
        forget_sums(pl_module)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the adapters that the evaluation chose and that did not run in it."""
        if self._chosen is not None and self._liveness is not None:
            self._liveness.evaluated_adapters = self._chosen.evaluated
        super().on_validation_end(trainer, pl_module)

    @override
    def forget(self) -> None:
        super().forget()
        self._chosen = self._gradients = None

    @override
    def begin_batch(
        self, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int = 0, trains: bool = False
    ) -> None:
        if self._chosen is None or self._run is None:
            return
        try:
            self._chosen.begin(batch, dataloader_idx, trains)
        except ValueError:
            has_trained = self._gradients is not None and self._gradients.has_stepped
            self._run.abandoned = self._run.abandoned or not has_trained
            raise

    @override
    def end_batch(self) -> None:
        if self._chosen is not None:
            self._chosen.end()
