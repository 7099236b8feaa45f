"""The arguments of bottleneck adapters: what is taken and what is refused."""

from __future__ import annotations

import pytest

from lightning_lora.methods.bottleneck.config import BottleneckConfig

WRONG = [
    ({"size": 0}, ValueError, "`size` must be at least 1, but got 0. To add no adapter, leave the callback out."),
    ({"size": 2.5}, TypeError, "`size` must be an integer, but got 2.5."),
    ({"placement": "lora"}, ValueError, "`placement` must be one of 'houlsby', 'pfeiffer', 'parallel', 'block', but"),
    (
        {"activation": "swish"},
        ValueError,
        "`activation` must be one of 'gelu', 'relu', 'silu', 'tanh', but got 'swish'",
    ),
    ({"init_std": 0}, ValueError, "`init_std` must be positive and finite, but got 0"),
    ({"scale": -1}, ValueError, "`scale` must be positive and finite, but got -1"),
    ({"placement": "block", "segment_count": -1}, ValueError, "`segment_count` must be at least 0, but got -1"),
    ({"placement": "block", "segment_count": True}, TypeError, "`segment_count` must be an integer, but got True"),
    ({"segments": 1.5}, TypeError, "`segments` must be a key of the batch or an index in it, but got 1.5"),
    ({"placement": "block", "segments": "task"}, ValueError, "`segments='task'` needs the number of segments"),
    ({"segments": "task", "segment_count": 2}, ValueError, "`segment_count=2` adds task embeddings with placement"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        BottleneckConfig(**arguments)
    assert words in str(raised.value)


def test_plain_data_there_and_back():
    config = BottleneckConfig(size=3, placement="block", exclude=("head",))
    assert BottleneckConfig.from_file(config.to_dict()) == config


def test_only_what_changes_the_model_is_a_difference():
    config = BottleneckConfig(size=3)
    assert config.difference(BottleneckConfig(size=3, init_std=0.1, seed=5)) is None
    block = BottleneckConfig(placement="block", segments="task", segment_count=2)
    assert block.difference(BottleneckConfig(placement="block", segment_count=2)) is None
    assert block.difference(BottleneckConfig(placement="block")) == "`segment_count=0` instead of `segment_count=2`"
    assert config.difference(BottleneckConfig(size=4)) == "`size=4` instead of `size=3`"
    assert config.difference(BottleneckConfig(size=3, scale=4)) == "`scale=4` instead of `scale=1.0`"
