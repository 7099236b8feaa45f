"""What is refused under DeepSpeed before it is asked for anything; test_strategies.py runs it, where it is there."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.trainer.strategies.deepspeed import DeepSpeed
from tests.helpers.models import net


def strategy_adapter(precision: str = "32-true", **config: object) -> DeepSpeed:
    model = net()
    apply_lora(model, LoRAConfig(r=2, targets=["q"], **config))
    plugin = SimpleNamespace(precision=precision)
    return DeepSpeed(SimpleNamespace(precision_plugin=plugin, config={}), model)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true"])
def test_a_precision_in_which_the_engine_casts_what_trains(precision):
    with pytest.raises(MisconfigurationException, match=f"`precision='{precision}'` under DeepSpeedStrategy makes its"):
        strategy_adapter(precision).at_setup(ExitStack())


def test_two_dtypes_among_what_trains():
    with pytest.raises(MisconfigurationException, match=r"`head.weight` would train in bf16 and the adapters in fp32"):
        strategy_adapter("bf16-true", also_train=["head"]).before_wrap(ExitStack())


def test_a_group_that_it_would_drop_and_a_scheduler_that_counts_on_it():
    adapters = [parameter for _, parameter in lora_parameters(net_with_adapters())]
    optimizer = torch.optim.AdamW([{"params": adapters}, {"params": [torch.nn.Parameter(torch.zeros(1))]}])
    optimizer.param_groups[1]["params"][:] = []
    strategy_adapter().after_optimizers(ExitStack(), [optimizer], [])
    with pytest.raises(MisconfigurationException, match=r"holds nothing that LoRA trains\. DeepSpeed drops it, and"):
        strategy_adapter().after_optimizers(ExitStack(), [optimizer], [object()])


def net_with_adapters() -> torch.nn.Module:
    model = net()
    apply_lora(model, LoRAConfig(r=2, targets=["q"]))
    return model


@pytest.mark.parametrize("found", [None, {"enabled": True}])
def test_the_configuration_is_given_back(found):
    one, stack = strategy_adapter("bf16-true"), ExitStack()
    one.strategy.config |= {} if found is None else {"bf16": found}
    one.before_wrap(stack)
    assert one.strategy.config == {"bf16": {"enabled": False}}
    stack.close()
    assert one.strategy.config == ({} if found is None else {"bf16": found})
