"""DDP under Lightning: a gradient that comes in several parts is refused, as only the first part would be averaged."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora.foreign import IGNORED_BY_DDP
from lightning_lora.model.freeze import trained_parameters
from lightning_lora.ops.packed.quantized_tensors import is_quantized_tensor, stored_tensors
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.patching import patch_attribute, patch_method
from lightning_lora.trainer.strategies.base import StrategyAdapter


class DDP(StrategyAdapter):
    """``DDPStrategy``: the first backward pass is watched, and quantized weights are broadcast as they are stored."""

    def before_wrap(self, stack: ExitStack) -> None:
        """DDP broadcasts every parameter by views of its memory, which a quantized tensor does not have."""
        super().before_wrap(stack)
        quantized = {name: p for name, p in self.module.named_parameters() if is_quantized_tensor(p)}
        if not quantized:
            return
        if distributed.is_initialized():
            for parameter in quantized.values():
                for stored in stored_tensors(parameter):
                    _broadcast(stored)
        ignored: set[str] = set(getattr(self.module, IGNORED_BY_DDP, ()))
        patch_attribute(stack, self.module, IGNORED_BY_DDP, ignored | quantized.keys())

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


@torch.no_grad()
def _broadcast(tensor: Tensor) -> None:
    """Give every rank the values of rank 0, byte by byte: Gloo knows no dtype of 8-bit floating point."""
    values = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    distributed.broadcast(values.view(torch.uint8), 0)
    tensor.copy_(values.view(tensor.shape))


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
