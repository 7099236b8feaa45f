"""The arguments of a subspace: what is refused, and the seed that is part of them."""

from __future__ import annotations

import pytest

from lightning_lora.methods.subspace.config import SubspaceConfig


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dimension": 0}, ValueError, "`dimension` must be at least 1"),
        ({"dimension": 2.5}, TypeError, "`dimension` must be an integer"),
        ({"projection": "random"}, ValueError, "`projection` must be one of 'fastfood', 'dense', but got 'random'"),
        ({"structure": 1}, TypeError, "`structure` must be a bool"),
        ({"targets": "head"}, ValueError, r"`targets` must be 'all' or a list .* write targets=\['head'\]"),
        ({"targets": []}, ValueError, "`targets` must name at least one module"),
        ({"exclude": "head"}, TypeError, "`exclude` must be a list"),
        ({"seed": 1.5}, TypeError, "`seed` must be an integer"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        SubspaceConfig(**arguments)


def test_the_seed_of_a_run_becomes_a_part_of_the_configuration(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert SubspaceConfig().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    config = SubspaceConfig()
    assert config.seed == 7
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert SubspaceConfig.from_file(config.to_dict()) == config
    assert config.difference(SubspaceConfig()) == "`seed=8` instead of `seed=7`"
