"""``lr_scale``: multiply the learning rate of adapters, through every scheduler of torch.

LoRA wants about ten times the rate of full fine-tuning, and the module that sets the rate stays as it is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch.optim import Optimizer

from lightning_lora.trainer.imports import MisconfigurationException

GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")


def scale_rates(optimizers: list[Optimizer], schedulers: list[Any], scale: float, added: Container[int]) -> None:
    """Multiply every rate of the groups that hold adapters by ``scale``.

    CosineAnnealingLR and its like have one ``eta_min`` for all groups. Where only some groups hold adapters it must be
    0, as it cannot be scaled for those alone.

    Args:
        optimizers: the module's, restricted to what trains.
        schedulers: theirs, plain or in Lightning's dicts.
        scale: the factor.
        added: the ``id`` of each parameter of an adapter.

    Raises:
        MisconfigurationException: if an optimizer has no rate, or a scheduler one floor for groups of both kinds.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    scaled = {id(group): any(id(parameter) in added for parameter in group["params"]) for group in groups}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if scaled[id(group)]:
                _scale_group(group, scale, type(optimizer).__name__)
    for scheduler in schedulers:
        _scale_scheduler(scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler, scale, scaled)


def _scale_group(group: dict[str, Any], scale: float, optimizer: str) -> None:
    if group.get("lr") is None:
        raise MisconfigurationException(
            f"`lr_scale={scale}` needs a learning rate to multiply, but {optimizer} has none. Set lr_scale=1."
        )
    for key in GROUP_RATES:
        if key in group:
            group[key] = group[key] * scale


def _scale_scheduler(scheduler: Any, scale: float, scaled: dict[int, bool]) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR and ChainedScheduler
        _scale_scheduler(inner, scale, scaled)
    groups = scheduler.optimizer.param_groups
    for name in SCHEDULER_RATES:
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list) and len(rates) == len(groups):
            new = [rate * scale if scaled[id(group)] else rate for rate, group in zip(rates, groups, strict=True)]
            setattr(scheduler, name, new)  # not in place: SequentialLR shares its list with an inner scheduler
    if getattr(scheduler, "eta_min", 0):
        _scale_floor(scheduler, scale, [scaled[id(group)] for group in groups if group["params"]])


def _scale_floor(scheduler: Any, scale: float, scaled: list[bool]) -> None:
    if not all(scaled):
        raise MisconfigurationException(
            f"`lr_scale={scale}` cannot scale `eta_min={scheduler.eta_min}` of {type(scheduler).__name__}: it is one "
            "floor for groups with adapters and groups without. Set eta_min=0, or lr_scale=1."
        )
    scheduler.eta_min = scheduler.eta_min * scale
