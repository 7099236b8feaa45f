"""Which adapter goes with a Trainer's strategy."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.foreign import REPLICATING_STRATEGY, SHARDING_STRATEGIES, is_a
from lightning_lora.trainer.strategies.base import StrategyAdapter
from lightning_lora.trainer.strategies.ddp import DDP
from lightning_lora.trainer.strategies.deepspeed import DeepSpeed
from lightning_lora.trainer.strategies.fsdp import FSDP1, FSDP2

ADAPTERS: tuple[type[StrategyAdapter], ...] = (FSDP1, FSDP2, DeepSpeed, DDP)  # DeepSpeedStrategy is a DDPStrategy


def strategy_adapter_for(strategy: Any, module: nn.Module) -> StrategyAdapter:
    """The adapter for ``strategy``, known by the name of its class."""
    pairs = zip((*SHARDING_STRATEGIES, REPLICATING_STRATEGY), ADAPTERS, strict=True)
    adapters = (adapter for name, adapter in pairs if is_a(strategy, name))
    return next(adapters, StrategyAdapter)(strategy, module)
