"""What the callbacks of all methods share: hooks of a few lines over :mod:`lightning_lora.trainer.run`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_lora.arguments import check_argument_names
from lightning_lora.config import RunConfig
from lightning_lora.methods.base import Method
from lightning_lora.model.hooks import start_graphs
from lightning_lora.trainer.checkpointing import contents
from lightning_lora.trainer.checkpointing.quantized_base import keep_plain
from lightning_lora.trainer.compatibility import check_compatibility
from lightning_lora.trainer.end_of_fit import finish
from lightning_lora.trainer.imports import CallbackBase, pl, rank_zero_info
from lightning_lora.trainer.kept_copies import keep_averages_exact
from lightning_lora.trainer.learning_rates import learning_rates
from lightning_lora.trainer.rate_search import scale_search
from lightning_lora.trainer.run import Run
from lightning_lora.trainer.watching.kept_layers import KeptLayers
from lightning_lora.trainer.watching.liveness import Liveness


class MethodCallback(CallbackBase):
    """Base of the callbacks: a sub-class is its arguments, its method and its docstring.

    Args:
        method: what the module is adapted by.
        run_config: what a run does with it.
    """

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Say what an argument of peft is called here; one that the class takes itself is its own."""
        check_argument_names(cls.__name__, arguments, inspect.signature(cls.__init__).parameters)
        return super().__new__(cls)

    def __init__(self, method: Method, run_config: RunConfig) -> None:
        super().__init__()
        self.method, self.run_config = method, run_config
        self._run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: no run, and no ``log``, which Lightning binds to the module.

        Hyperparameters of a module may hold the callback, and would take the whole module into every checkpoint.
        """
        bound = {key for key, value in self.__dict__.items() if isinstance(getattr(value, "__self__", None), nn.Module)}
        return {key: value for key, value in self.__dict__.items() if key not in bound} | {"_run": None}

    @property
    def state_key(self) -> str:
        """The key of the callback in checkpoints; r is not in it, as a changed r must fail and not be skipped."""
        return f"{type(self).__name__}[{self.method.config.name}]"

    @property
    def _liveness(self) -> Liveness | None:
        """The watch over the adapters in the first steps of a run."""
        return None if self._run is None else self._run.first_steps.liveness

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the module, and patch what the run will call."""
        check_compatibility(trainer, self, stage)
        self._run = Run(trainer, pl_module, self.method, self.run_config, stage, self.state_key)
        self._run.begin()
        keep_plain(self._run.stack, trainer, self.method)
        scale_search(self._run.stack, trainer, self.method, self.run_config.lr_scale)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue a resumed run's random stream, and log the configuration."""
        assert self._run is not None
        start_graphs(pl_module)  # checkpointing may have been switched on since
        self._run.first_steps.kept_layers = KeptLayers(pl_module)
        keep_averages_exact(trainer, pl_module, self._run.stack)
        self._run.files.restore_random_state()
        for logger in trainer.loggers:
            logger.log_hyperparams({self.method.key: {**self.method.config.to_dict(), **self.run_config.to_dict()}})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the learning rates, and watch the adapters in the first steps."""
        if self._run is not None:
            self._run.release_copies()
        added = {id(parameter) for _, parameter in self.method.added_parameters(pl_module)}
        rates = learning_rates(trainer.optimizers, added, self.run_config.lr_scale)
        if rates:
            rank_zero_info(rates)
        if self._run is not None:
            self._run.first_steps.warn_at_start()
            self._run.first_steps.watch(trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch the base is complete; in the next ones, name what moves though it is frozen."""
        if self._run is not None:
            if batch_idx == 0:
                self._run.first_steps.check_layers()
            self._run.begin_batch(batch_idx)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Raise for a loss that depends on nothing that trains."""
        if self._run is not None:
            self._run.first_steps.check_loss(loss)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """At each optimizer's first step, name the adapters without a gradient."""
        if self._liveness is not None:
            self._liveness.check_step(optimizer, trainer.optimizers)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the adapters in the first evaluation."""
        if self._liveness is not None:
            self._liveness.begin_evaluation()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the adapters that did not run in it."""
        if self._liveness is not None:
            self._liveness.check_evaluation()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the adapters that ran in no step of a short run."""
        if self._run is not None:
            self._run.first_steps.check_layers()
        if self._liveness is not None:
            self._liveness.report_waiting()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave in ``checkpoint`` what an adapter file holds; calling it again changes nothing more.

        Lightning calls it before the hooks of other callbacks and of the module, which see the whole state dict. So the
        save of a run is not filtered here but where it is written, as are saves that call no callback. A merged module
        is the plain model, and its state dict stays whole.
        """
        if self._run is not None:
            self._run.first_steps.check_layers()
        seen_by_hooks = None if self._run is None else self._run.files.seen_by_hooks
        if seen_by_hooks is not None and checkpoint.get("state_dict") is seen_by_hooks:
            return
        if self._run is None and self.method.is_plain(pl_module):
            return
        if self.method.is_adapted(pl_module):
            adapter_only = contents.without_base(checkpoint, self.method, pl_module)
            checkpoint.clear()
            checkpoint.update(adapter_only)

    @override
    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Export and merge; the strategy is torn down, and the module is back on the CPU."""
        assert self._run is not None
        finish(self._run)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the run; one that has not ended by now was only to tune a batch size or a learning rate."""
        if self._run is None:
            return
        self._run.abandoned = self._run.abandoned or not self._run.ended
        if self._run.late_saves is None:
            self.forget()
        else:  # an error in a later hook may make a callback save
            self._run.late_saves.callback(self.forget)

    def forget(self) -> None:
        """Drop the reference to the run."""
        self._run = None
