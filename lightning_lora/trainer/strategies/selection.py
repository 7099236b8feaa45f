"""Which adapter goes with a Trainer's strategy."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.foreign import SHARDING_STRATEGIES, is_a
from lightning_lora.trainer.strategies.base import StrategyAdapter
from lightning_lora.trainer.strategies.deepspeed import DeepSpeed
from lightning_lora.trainer.strategies.fsdp import FSDP1, FSDP2

SHARDING_ADAPTERS: tuple[type[StrategyAdapter], ...] = (FSDP1, FSDP2, DeepSpeed)


def strategy_adapter_for(strategy: Any, module: nn.Module) -> StrategyAdapter:
    """The adapter for ``strategy``, known by the name of its class."""
    pairs = zip(SHARDING_STRATEGIES, SHARDING_ADAPTERS, strict=True)
    adapters = (adapter for name, adapter in pairs if is_a(strategy, name))
    return next(adapters, StrategyAdapter)(strategy, module)
