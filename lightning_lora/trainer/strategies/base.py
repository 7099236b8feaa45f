"""What a run asks of its strategy, with the answers of one device.

The hooks are named by when a run calls them. A strategy that shards has only the frozen base to shard; see
:mod:`lightning_lora.trainer.strategies.fsdp` and :mod:`lightning_lora.trainer.strategies.deepspeed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn

from lightning_lora.names import counted
from lightning_lora.trainer.strategies.quantized import check_cast_codes


class StrategyAdapter:
    """What a run does with its strategy; one device needs nothing.

    Args:
        strategy: the Trainer's.
        module: its LightningModule.
    """

    loads_late = False  # whether it loads checkpoints after it has set up the model and the optimizers
    keeps_weights_whole = True  # whether the weights of several layers are there at the same time
    watches_gradients = True  # whether parameters hold their gradients at the optimizer's step

    def __init__(self, strategy: Any, module: nn.Module) -> None:
        self.strategy, self.module = strategy, module

    def at_setup(self, stack: ExitStack) -> None:
        """Before the module is touched: until ``stack`` closes, the strategy reads and writes one file."""

    def before_injection(self, bare: bool) -> None:
        """Raise if adapters could not act in the module as it is laid out.

        Args:
            bare: whether the module had no adapters when the run began.
        """

    def during_injection(self) -> AbstractContextManager[None]:
        """The context in which adapters are made."""
        return nullcontext()

    def after_injection(self) -> None:
        """After adapters were made, at each time."""

    def before_wrap(self, stack: ExitStack) -> None:
        """After injection, before the strategy wraps the module.

        Raises:
            MisconfigurationException: if the module cannot be cast or wrapped as the Trainer asks for.
        """
        check_cast_codes(self.strategy, self.module)

    def after_optimizers(self, stack: ExitStack, optimizers: list[Any], schedulers: list[Any]) -> None:
        """After the optimizers were restricted to what trains."""

    def needs_every_gradient(self) -> bool:
        """Whether a backward pass must reach every trained parameter, on every rank."""
        return False

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the optimizers from a file, where the strategy shards."""

    def after_merge(self) -> None:
        """After the adapters were added to the weights: they are no parameters of the module any more."""


def states_in(checkpoint: Mapping[str, Any], count: int) -> list[Any]:
    """The states of ``count`` optimizers in a file.

    Raises:
        ValueError: if it has none, or more or fewer.
    """
    states: list[Any] | None = checkpoint.get("optimizer_states")
    if states is None:
        raise ValueError(
            "The checkpoint was saved with weights only, without the state of the optimizers, so training cannot "
            "continue from it. Save it with `save_weights_only=False`."
        )
    if len(states) != count:
        raise ValueError(
            f"The checkpoint holds the state of {counted(len(states), 'optimizer')}, but the module has {count}: "
            "resume with the `configure_optimizers` that it was written with."
        )
    return states
