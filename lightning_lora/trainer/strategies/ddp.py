"""DDP under Lightning: a gradient that comes in several parts is refused, as only the first part would be averaged."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_lora.model.freeze import trained_parameters
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.patching import patch_method
from lightning_lora.trainer.strategies.base import StrategyAdapter


class DDP(StrategyAdapter):
    """``DDPStrategy``: the first backward pass is watched."""

    def after_optimizers(self, stack: ExitStack, optimizers: list[Any], schedulers: list[Any]) -> None:
        """Watch what trains, unless DDP averages at the end of the pass alone."""
        if self.strategy.world_size == 1 or self.strategy._ddp_kwargs.get("static_graph"):
            return
        parts = GradientParts(self.module)
        stack.callback(parts.close)
        patch_method(stack, self.strategy, "pre_backward", parts.begin)
        patch_method(stack, self.strategy, "post_backward", parts.end)

    def needs_every_gradient(self) -> bool:
        """DDP waits for every parameter in every pass, unless it looks for unused ones."""
        kwargs = self.strategy._ddp_kwargs
        return bool(kwargs.get("static_graph")) or not kwargs.get("find_unused_parameters")


class GradientParts:
    """Raises in the first backward pass if a parameter gets its gradient in several parts.

    Reentrant activation checkpointing runs one backward pass for each segment. A parameter that two segments read gets
    a part of its gradient in each, and DDP averages when the first comes: the ranks would drift apart in silence.

    Args:
        module: whose trained parameters are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.seen: set[str] = set()
        self.active = False
        self.handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))  # type: ignore[no-untyped-call]
            for name, parameter in trained_parameters(module)
        ]

    def begin(self, original: Any, loss: Tensor) -> Any:
        """Before a backward pass of Lightning."""
        self.active = bool(self.handles)
        return original(loss)

    def end(self, original: Any, loss: Tensor) -> Any:
        """After it."""
        self.close()
        return original(loss)

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        self.active = False
        while self.handles:
            self.handles.pop().remove()

    def _note(self, name: str, parameter: Tensor) -> None:
        if self.active and name in self.seen:
            raise MisconfigurationException(
                f"`{name}` got its gradient in several parts, as reentrant activation checkpointing gives it to what "
                "several segments read, and DDP averages the first part alone. Use checkpoint(..., "
                "use_reentrant=False), or DDPStrategy(static_graph=True)."
            )
        if self.active:
            self.seen.add(name)
