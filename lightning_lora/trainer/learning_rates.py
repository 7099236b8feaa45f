"""The line at the start of a run that shows the learning rates of adapters and of what trains in full."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from torch.optim import Optimizer

FULL_FINE_TUNING = 1e-4  # with Adam all weights want a smaller rate: transformers' Trainer has 5e-5
ADAPTERS, REST, BOTH = "adapters", "what trains in full", "adapters and what trains in full, in one group,"


def learning_rates(optimizers: Iterable[Optimizer], added: Container[int], lr_scale: float) -> str:
    """The rates before the factor of a scheduler, as one line; empty where no group holds an adapter.

    Args:
        optimizers: those of the run, restricted to what trains.
        added: the ``id`` of each parameter of an adapter.
        lr_scale: the factor that is in the rates already.
    """
    parts: list[str] = []
    notes: list[str] = []
    kinds: set[str] = set()
    for optimizer in optimizers:
        rates = _rates_by_kind(optimizer, added)
        kinds |= rates.keys()
        if rates:
            shown = ", ".join(f"{kind} {_range(values)}" for kind, values in rates.items())
            parts.append(f"{type(optimizer).__name__}: {shown}")
        if lr_scale == 1 and _is_for_full_fine_tuning(optimizer, rates):
            notes.append("That is a rate of full fine-tuning; LoRA wants about ten times more: lr_scale=10.")
    if not kinds & {ADAPTERS, BOTH}:
        return ""
    if lr_scale != 1:
        also = "; give what trains in full a group of its own to leave its rate alone" if BOTH in kinds else ""
        notes.append(f"The groups with adapters have lr_scale={lr_scale:g} in their rates{also}.")
    return " ".join([f"Learning rates of {'; '.join(parts)}.", *dict.fromkeys(notes)])


def _rates_by_kind(optimizer: Optimizer, added: Container[int]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        here = {id(parameter) in added for parameter in group["params"]}
        rate = _rate(group)
        if here and rate is not None:
            kind = BOTH if len(here) == 2 else ADAPTERS if here == {True} else REST
            rates.setdefault(kind, []).append(rate)
    return rates


def _rate(group: dict[str, Any]) -> float | None:
    """The highest rate that the group is meant to reach: a warm-up starts near 0."""
    rates = [group[key] for key in ("max_lr", "initial_lr", "lr") if group.get(key) is not None]
    return float(rates[0]) if rates else None


def _range(rates: list[float]) -> str:
    low, high = min(rates), max(rates)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _is_for_full_fine_tuning(optimizer: Optimizer, rates: dict[str, list[float]]) -> bool:
    of_adapters = [*rates.get(ADAPTERS, ()), *rates.get(BOTH, ())]
    return "Adam" in type(optimizer).__name__ and bool(of_adapters) and 0 < max(of_adapters) < FULL_FINE_TUNING
