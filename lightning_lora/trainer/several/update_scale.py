"""The rate of each adapter: its own ``lr_scale`` multiplies the update that an optimizer's step makes of it.

A group of its own for each rate would change the number of groups, on which schedulers, checkpoints and user code
count. For an optimizer whose update is proportional to the rate, as in SGD and Adam with weight decay of either kind, a
scaled update is what a scaled rate gives, to rounding; whatever sets the rate of the group, the factor stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_lora.distributed.sharded import local_shard
from lightning_lora.methods.base import Method
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.trainer.imports import MisconfigurationException, rank_zero_info
from lightning_lora.trainer.lr_scale import scale_rates

PROPORTIONAL = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)


def scale_learning_rates(
    optimizers: list[Optimizer], schedulers: list[Any], lr_scale: float, method: Method, module: nn.Module
) -> Callable[[], None]:
    """Multiply the rates of groups with adapters by ``lr_scale``, and the updates of adapters by factors of their own.

    Args:
        optimizers: the module's, restricted to what trains.
        schedulers: theirs, plain or in Lightning's dicts.
        lr_scale: the factor of the callback.
        method: what ``module`` is adapted by.
        module: the module that trains.

    Returns:
        A function that undoes it.

    Raises:
        MisconfigurationException: if a rate or an update cannot be scaled.
    """
    stack = ExitStack()
    if lr_scale != 1:
        added = {id(parameter) for _, parameter in method.main_parameters(module)}
        stack.callback(scale_rates(optimizers, schedulers, lr_scale, added))
    factors = _factors(method, module)
    for optimizer in optimizers if factors else ():
        scaled = ScaledUpdates(optimizer, factors)
        if scaled.parameters:
            _check_proportional(optimizer)
            stack.callback(scaled.close)
    return stack.close


def _factors(method: Method, module: nn.Module) -> dict[int, float]:
    """The factor of each parameter whose adapter has one, by ``id``."""
    own = {} if not isinstance(method, LoRAMethod) else method.config.adapters or {}
    scales = {name: float(each.get("lr_scale", 1)) for name, each in own.items()}
    scales = {name: scale for name, scale in scales.items() if scale != 1}
    for name, scale in scales.items():
        rank_zero_info(f"Adapter `{name}` trains at {scale:g} times the learning rate that its group shows.")
    if not scales or not isinstance(method, LoRAMethod):
        return {}
    names = method.name_of_parameters(module)
    return {key: scales[name] for key, name in names.items() if name in scales}


def _check_proportional(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, PROPORTIONAL):
        raise MisconfigurationException(
            f"`lr_scale` in `adapters` multiplies the update of an adapter, and that of {type(optimizer).__name__} is "
            f"not known to be proportional to the rate. Use {', '.join(each.__name__ for each in PROPORTIONAL)}, or "
            "leave `lr_scale` out of `adapters`."
        )


class ScaledUpdates:
    """Multiplies the updates of some parameters in each step of ``optimizer``.

    Args:
        optimizer: whose steps are watched.
        factors: by the ``id`` of a parameter.

    Attributes:
        parameters: those with a factor, by the factor.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[int, float]) -> None:
        self.parameters: dict[float, list[Tensor]] = {}
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if id(parameter) in factors:
                self.parameters.setdefault(factors[id(parameter)], []).append(parameter)
        self.before: dict[int, Tensor] = {}
        self.handles = []
        if self.parameters:
            self.handles = [optimizer.register_step_pre_hook(self.begin), optimizer.register_step_post_hook(self.end)]

    @torch.no_grad()
    def begin(self, *_: Any) -> None:
        """Before the step: keep the values."""
        every = [parameter for parameters in self.parameters.values() for parameter in parameters]
        if not self.before:
            self.before = {id(parameter): torch.empty_like(local_shard(parameter)) for parameter in every}
        torch._foreach_copy_([self.before[id(each)] for each in every], [local_shard(each) for each in every])

    @torch.no_grad()
    def end(self, *_: Any) -> None:
        """After it: add to each value what the step changed, times the factor less one."""
        for factor, parameters in self.parameters.items():
            stepped = [parameter for parameter in parameters if parameter.grad is not None]
            if stepped:
                now = [local_shard(parameter) for parameter in stepped]
                changes = torch._foreach_sub(now, [self.before[id(parameter)] for parameter in stepped])
                torch._foreach_add_(now, changes, alpha=factor - 1)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self.handles:
            handle.remove()
