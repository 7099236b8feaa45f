"""``lr_scale``: multiply the learning rate of adapters, through every scheduler of torch.

LoRA wants about ten times the rate of full fine-tuning, and the module that sets the rate stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_lora.trainer.imports import MisconfigurationException

GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")


@dataclass
class ScaledRate:
    """One rate, or one list of rates, that was multiplied.

    Args:
        holder: the group, or the attributes of the scheduler.
        key: its name in ``holder``.
        before: the value before.
        after: the value after.
        factor: of the value, or of each value of a list.
    """

    holder: dict[str, Any]
    key: str
    before: Any
    after: Any
    factor: Any

    def restore(self) -> None:
        """Divide by the factor again. A rate that no scheduler changed gets exactly the value that it had."""
        now = self.holder[self.key]
        if isinstance(now, list):
            parts = zip(now, self.before, self.after, self.factor, strict=True)
            self.holder[self.key] = [_divided(*part) for part in parts]
        else:
            self.holder[self.key] = _divided(now, self.before, self.after, self.factor)


def _divided(now: Any, before: Any, after: Any, factor: float) -> Any:
    return before if now is after or now == after else now / factor


def scale_rates(
    optimizers: list[Optimizer], schedulers: list[Any], scale: float, added: Container[int]
) -> Callable[[], None]:
    """Multiply every rate of the groups that hold adapters by ``scale``.

    CosineAnnealingLR and its like have one ``eta_min`` for all groups. Where only some groups hold adapters it must be
    0, as it cannot be scaled for those alone.

    Args:
        optimizers: the module's, restricted to what trains.
        schedulers: theirs, plain or in Lightning's dicts.
        scale: the factor.
        added: the ``id`` of each parameter of an adapter.

    Returns:
        A function that divides the rates by ``scale`` again: an optimizer that was made before the run outlives it.

    Raises:
        MisconfigurationException: if an optimizer has no rate, or a scheduler one floor for groups of both kinds.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    scaled = {id(group): any(id(parameter) in added for parameter in group["params"]) for group in groups}
    rates: list[ScaledRate] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if scaled[id(group)]:
                rates += _rates_of_group(group, scale, type(optimizer).__name__)
    for config in schedulers:
        scheduler = config["scheduler"] if isinstance(config, dict) else config
        rates += _rates_of_scheduler(scheduler, scale, scaled)
    for rate in rates:
        rate.holder[rate.key] = rate.after  # a new list: SequentialLR shares its list with an inner scheduler

    def restore() -> None:
        for rate in rates:
            rate.restore()

    return restore


def _rates_of_group(group: dict[str, Any], scale: float, optimizer: str) -> Iterator[ScaledRate]:
    if group.get("lr") is None:
        raise MisconfigurationException(
            f"`lr_scale={scale}` needs a learning rate to multiply, but {optimizer} has none. Set lr_scale=1."
        )
    for key in GROUP_RATES:
        if key in group:
            yield ScaledRate(group, key, group[key], group[key] * scale, scale)


def _rates_of_scheduler(scheduler: Any, scale: float, scaled: dict[int, bool]) -> Iterator[ScaledRate]:
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR and ChainedScheduler
        yield from _rates_of_scheduler(inner, scale, scaled)
    groups = scheduler.optimizer.param_groups
    factors = [scale if scaled[id(group)] else 1 for group in groups]
    for name in SCHEDULER_RATES:
        rates = getattr(scheduler, name, None)
        if isinstance(rates, list) and len(rates) == len(groups):
            new = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
            yield ScaledRate(vars(scheduler), name, rates, new, factors)
    if getattr(scheduler, "eta_min", 0):
        _check_floor(scheduler, scale, [scaled[id(group)] for group in groups if group["params"]])
        yield ScaledRate(vars(scheduler), "eta_min", scheduler.eta_min, scheduler.eta_min * scale, scale)


def _check_floor(scheduler: Any, scale: float, scaled: list[bool]) -> None:
    if not all(scaled):
        raise MisconfigurationException(
            f"`lr_scale={scale}` cannot scale `eta_min={scheduler.eta_min}` of {type(scheduler).__name__}: it is one "
            "floor for groups with adapters and groups without. Set eta_min=0, or lr_scale=1."
        )
