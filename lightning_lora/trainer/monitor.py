"""LoRAMonitor: the size, the stable rank and the amplification of the updates, in the logs of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.analysis.measures import Measure, amplification_of, measure, ratio_of, stable_rank_of
from lightning_lora.arguments import check_length
from lightning_lora.layers.base import is_adapted
from lightning_lora.trainer.imports import CallbackBase, MisconfigurationException, pl

QUANTITIES: dict[str, Callable[[Sequence[Measure]], float]] = {
    "ratio": ratio_of,
    "stable_rank": stable_rank_of,
    "amplification": amplification_of,
}


class LoRAMonitor(CallbackBase):
    """Log how the adapters change the weights: the size, the stable rank and the amplification of their updates.

    With delta = scale * B A of a layer, "ratio" is |delta| / |W|, "stable_rank" is |delta|^2 / |delta|_2^2 (how many
    directions delta has, between 1 and r), and "amplification" is |delta| / |U^T W V|, with the singular directions U
    and V of delta (table 7 of Hu et al. 2021, arXiv 2106.09685). Norms without an index are Frobenius norms.

    Every logger of the Trainer gets lora_<quantity>/<layer> for each layer, and lora_<quantity> for all of them: the
    two quotients are then those of the norms of all layers together, the stable rank is the mean. The experts of one
    layer count in the same way. Before the first step delta is zero, and only the ratio is defined.

    It measures before the first step of a run, then after every_n_steps steps, and at the end. A measurement does not
    build delta: it takes about as long as the forward pass of r tokens. Under every strategy all ranks measure, and the
    first one logs; each sharded weight is gathered once. A quantized weight is dequantized, one layer at a time.
    LoRAMonitor may come before or after LoRACallback in the list, and measures a module that apply_lora adapted, too.

    Args:
        every_n_steps: Steps of the optimizer between two measurements.
        name: Name of the adapter to measure, which is then part of the keys: lora_<quantity>/<name>/<layer>. None is
            the only adapter of the module.

    Raises:
        ValueError: If every_n_steps is below 1. Before the first step, if the module has several adapters and name is
            None, or if a quantized weight is sharded.
        TypeError: If every_n_steps is no integer.
        MisconfigurationException: At the start of a run, if the Trainer has no logger or the module has no adapters.

    Example:
        >>> import lightning
        >>> from lightning_lora import LoRACallback
        >>> callbacks = [LoRACallback(r=8, targets="attn"), LoRAMonitor(every_n_steps=50)]
        >>> trainer = lightning.Trainer(callbacks=callbacks)
    """

    def __init__(self, every_n_steps: int = 50, name: str | None = None) -> None:
        super().__init__()
        check_length("every_n_steps", every_n_steps, "measurement")
        self.every_n_steps, self.name = every_n_steps, name
        self._measured_at: int | None = None
        self._weight_norms: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if there is nothing to measure or nowhere to log it."""
        if not trainer.loggers:
            raise MisconfigurationException(
                "LoRAMonitor logs to the Trainer's loggers, and it has none. Give it a `logger`, such as CSVLogger, or "
                "leave LoRAMonitor out."
            )
        if not is_adapted(pl_module):
            raise MisconfigurationException(
                f"LoRAMonitor measures LoRA adapters, and {type(pl_module).__name__} has none. Add a LoRACallback to "
                "the Trainer, or leave LoRAMonitor out."
            )
        self._measured_at, self._weight_norms = None, {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure before the first step, and at every multiple of ``every_n_steps``."""
        if self._measured_at is None or _steps(trainer) % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the run ends with, before it is merged."""
        self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = _steps(trainer)
        if step == self._measured_at:  # a batch whose gradients accumulate is no step
            return
        self._measured_at = step
        values = self._values(measure(pl_module, self.name, self._weight_norms))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _values(self, measures: dict[str, Measure]) -> dict[str, float]:
        """Every quantity that is defined, by its key."""
        values: dict[str, float] = {}
        for quantity, of in QUANTITIES.items():
            key = f"lora_{quantity}" if self.name is None else f"lora_{quantity}/{self.name}"
            values |= {key: of(list(measures.values()))}
            values |= {f"{key}/{layer}": of([each]) for layer, each in measures.items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}


def _steps(trainer: pl.Trainer) -> int:
    """The steps so far, as Lightning's own callbacks count them: one for a batch, however many optimizers stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
