"""Updates of one form are measured together: as each alone, and with few operations for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.analysis import update_group
from lightning_lora.analysis.measures import measure
from lightning_lora.analysis.update_group import groups_of
from lightning_lora.analysis.updates import updates_of
from tests.helpers.oracles import train_by_hand


def adapted(widths: list[tuple[int, int]], **config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*width) for width in widths))
    apply_lora(model, LoRAConfig(r=2, targets=["re:[0-9]+"], **config))
    train_by_hand(model)
    return model


def names(model: nn.Module) -> list[list[str]]:
    return [[update.name for update in group.updates] for group in groups_of(updates_of(model))]


def test_a_group_holds_the_updates_of_one_form():
    assert names(adapted([(6, 4), (6, 4), (5, 4), (6, 4)])) == [["0", "1", "3"], ["2"]]
    other_rank = {"rank_pattern": {"1": 3}, "alpha_pattern": {"2": 7.0}}
    assert names(adapted([(6, 4)] * 4, **other_rank)) == [["0", "3"], ["1"], ["2"]]


def test_large_updates_have_small_groups(monkeypatch):
    monkeypatch.setattr(update_group, "MAX_ELEMENTS", 2 * (2 * 6 + 4 * 2))
    assert names(adapted([(6, 4)] * 5)) == [["0", "1"], ["2", "3"], ["4"]]
    monkeypatch.setattr(update_group, "MAX_ELEMENTS", 1)
    assert names(adapted([(6, 4)] * 2)) == [["0"], ["1"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_group_measures_what_each_update_alone_gives(dtype, monkeypatch):
    model = adapted([(6, 4)] * 3).to(dtype)
    together = measure(model)
    monkeypatch.setattr(update_group, "MAX_ELEMENTS", 1)
    alone = measure(model)
    assert list(together) == list(alone) == ["0", "1", "2"]
    for name, each in alone.items():
        for key, value in vars(each).items():
            torch.testing.assert_close(getattr(together[name], key), value, rtol=1e-12, atol=0)


class Operations(TorchDispatchMode):
    """How many operations run."""

    count = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.__name__.split(".")[0] not in ("detach", "view", "split_with_sizes", "select", "split")
        return function(*args, **(kwargs or {}))


def operations(layers: int) -> int:
    model = adapted([(6, 4)] * layers)
    norms: dict[str, torch.Tensor] = {}
    measure(model, weight_norms=norms)
    with Operations() as seen:
        measure(model, weight_norms=norms)
    return seen.count


def test_a_layer_more_takes_few_operations():
    assert operations(12) - operations(2) <= 10 * 4
