"""DeepSpeed's ZeRO under Lightning: its engine owns the optimizer; checkpoints are one file, not its directories."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from lightning_lora.distributed import deepspeed_optimizer as zero
from lightning_lora.model.freeze import adapter_parameters, in_files
from lightning_lora.model.sum_groups import compute_on_activations
from lightning_lora.names import clean
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.patching import patch_method
from lightning_lora.trainer.strategies.base import StrategyAdapter, states_in

PRECISIONS = ("32-true", "bf16-true")


class DeepSpeed(StrategyAdapter):
    """``DeepSpeedStrategy``, ZeRO 1 to 3."""

    loads_late = True
    keeps_weights_whole = False
    watches_gradients = False  # gradients go into the engine's buckets

    def __init__(self, strategy: Any, module: nn.Module) -> None:
        super().__init__(strategy, module)
        self.groups: list[list[nn.Parameter]] = []

    def at_setup(self, stack: ExitStack) -> None:
        """Write one file by the strategy's ``CheckpointIO``.

        Raises:
            MisconfigurationException: for a precision in which DeepSpeed would cast what trains.
        """
        precision = self.strategy.precision_plugin.precision
        if precision not in PRECISIONS:
            raise MisconfigurationException(
                f"`precision={precision!r}` under DeepSpeedStrategy makes its engine cast what trains, and adapters "
                f"stay in fp32. Use one of {', '.join(map(repr, PRECISIONS))}."
            )
        patch_method(stack, self.strategy, "save_checkpoint", self.save)
        patch_method(stack, self.strategy, "optimizer_state", self.optimizer_state)

    def save(self, original: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the file on rank zero; the other ranks wait."""
        path = self.strategy.broadcast(filepath)
        if self.strategy.is_global_zero:
            self.strategy.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self.strategy.barrier()

    def during_injection(self) -> AbstractContextManager[None]:
        """Leave ``deepspeed.zero.Init``, in which Lightning calls ``configure_model`` for ZeRO 3."""
        return zero.outside_of_init()

    def after_injection(self) -> None:
        """Compute on the side of the activations: the weights of several layers are never whole at the same time."""
        compute_on_activations(self.module)

    def before_wrap(self, stack: ExitStack) -> None:
        """Keep the engine from casting fp32 adapters to the bf16 of the base.

        Raises:
            MisconfigurationException: if something else trains in another dtype; ZeRO takes one dtype alone.
        """
        super().before_wrap(stack)
        adapters = adapter_parameters(self.module)
        for name, parameter in in_files(self.module):
            if self.strategy.precision_plugin.precision != "32-true" and id(parameter) not in adapters:
                raise MisconfigurationException(
                    f"`{name}` would train in bf16 and the adapters in fp32, but ZeRO takes parameters of one dtype "
                    "alone. Use precision='32-true', or leave out `also_train` and `bias`."
                )
        config = self.strategy.config
        back = (config.__setitem__, "bf16", config["bf16"]) if "bf16" in config else (config.pop, "bf16", None)
        stack.callback(*back)
        config["bf16"] = {"enabled": False}

    def after_optimizers(self, stack: ExitStack, optimizers: list[Any], schedulers: list[Any]) -> None:
        """Record the groups before the engine flattens their parameters.

        Raises:
            MisconfigurationException: if it would drop an empty group that a scheduler counts.
        """
        self.groups = [list(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
        if schedulers and not all(self.groups):
            raise MisconfigurationException(
                "A group of the optimizer holds nothing that LoRA trains. DeepSpeed drops it, and the scheduler would "
                "give its rate to another group. Use one group in `configure_optimizers`, or no scheduler."
            )

    def optimizer_state(self, original: Any, optimizer: Any) -> dict[str, Any]:
        """The state in torch's own format; every rank must call it."""
        return zero.optimizer_state(getattr(optimizer, "_optimizer", optimizer), self.groups)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states, and the fp32 values that the engine steps on."""
        (state,) = states_in(checkpoint, 1)
        name_of = {id(parameter): clean(name) for name, parameter in self.module.named_parameters()}
        values = {id(p): checkpoint["state_dict"][name_of[id(p)]] for group in self.groups for p in group}
        zero.load_optimizer(self.strategy.optimizers[0], self.groups, state, values)
