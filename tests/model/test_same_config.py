"""Which arguments make two configurations mean different adapters."""

from __future__ import annotations

import pytest

from lightning_lora import LoRAConfig
from lightning_lora.model.same_config import difference


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"r": 4}, "`r=4` instead of `r=8`"),
        ({"alpha": 16}, "`alpha=16` instead of `alpha=None`"),
        ({"targets": "qv"}, "`targets='qv'` instead of `targets='attn'`"),
        ({"bias": "all"}, "`bias='all'` instead of `bias='none'`"),
        ({"name": "de"}, "`name='de'` instead of `name='default'`"),
        ({"also_train": ["head"]}, r"`also_train=['head']` instead of `also_train=None`"),
    ],
)
def test_the_first_difference_is_named(arguments, expected):
    assert difference(LoRAConfig(), LoRAConfig(**arguments)) == expected


@pytest.mark.parametrize(
    "arguments", [{"dropout": 0.1}, {"seed": 3}, {"init": "gaussian"}, {"alpha": 8}, {"exclude": []}]
)
def test_what_changes_no_adapter_is_no_difference(arguments):
    assert difference(LoRAConfig(), LoRAConfig(**arguments)) is None


def test_alpha_none_equals_a_number_only_where_all_ranks_are_one():
    ranks = {"fc": 4}
    assert difference(LoRAConfig(rank_pattern=ranks), LoRAConfig(rank_pattern=ranks, alpha=8)) is not None


def test_the_order_of_patterns_counts():
    first, second = {"fc": 2, "fc1": 4}, {"fc1": 4, "fc": 2}
    assert "`rank_pattern=" in difference(LoRAConfig(rank_pattern=first), LoRAConfig(rank_pattern=second))
