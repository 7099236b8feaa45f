"""The arguments of AdapterFusion: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.methods.fusion.config import FusionConfig

WRONG = [
    ({}, ValueError, "`adapters` must be a list or a dict of at least one path, but got []"),
    (
        {"adapters": "runs/fr.ckpt"},
        ValueError,
        "`adapters` must be a list or a dict of at least one path, but got 'runs",
    ),
    ({"adapters": [3]}, TypeError, "`adapters` must be a path as a string, but got 3"),
    ({"adapters": [None]}, TypeError, "`adapters` must hold paths as strings, but got None"),
    ({"adapters": {"a.b": "x"}}, ValueError, "`adapters` must have Python identifiers as names, but got 'a.b'"),
    ({"adapters": ["x"], "init_std": 0}, ValueError, "`init_std` must be positive"),
    ({"adapters": ["x"], "bottleneck": {"size": 0}}, ValueError, "`size` must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        FusionConfig(**arguments)
    assert words in str(raised.value)


def test_plain_data_there_and_back():
    config = FusionConfig({"fr": Path("fr.ckpt")}, bottleneck={"size": 3})
    assert config.adapters == {"fr": "fr.ckpt"}
    assert FusionConfig.from_file(config.to_dict()) == config


def test_paths_are_no_difference_but_names_and_kinds_are():
    config = FusionConfig({"fr": "a.ckpt"}, bottleneck={"size": 3})
    assert config.difference(FusionConfig({"fr": "b.ckpt"}, bottleneck={"size": 3, "seed": 1})) is None
    assert config.difference(FusionConfig(["b.ckpt"])) is None
    named = "`adapters` named ['de'] instead of ['fr']"
    assert config.difference(FusionConfig({"de": "a.ckpt"}, bottleneck={"size": 3})) == named
    other = FusionConfig({"fr": "a.ckpt"}, bottleneck={"size": 4})
    assert config.difference(other) == "`size=4` instead of `size=3`"
    assert config.difference(FusionConfig({"fr": "a.ckpt"}, also_train=["head"])) is not None


def test_bottlenecks_with_task_embeddings_are_refused():
    bottleneck = {"size": 3, "placement": "block", "segment_count": 2}
    with pytest.raises(ValueError, match=r"task embeddings \(`segment_count=2`\), and a fusion cannot say"):
        FusionConfig(["fr.ckpt"], bottleneck=bottleneck)
