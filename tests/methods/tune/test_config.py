"""The arguments of TuneConfig: what they refuse, and what they are as data."""

from __future__ import annotations

import pytest

from lightning_lora import TuneCallback, TuneConfig


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"train": "biases"},
            ValueError,
            r"`train` must be one of 'bias', 'norm', 'head', 'all' or a list",
        ),
        ({"train": []}, ValueError, r"`train` must name at least one part of the model, but got \[\]"),
        ({"train": 3}, TypeError, "`train` must be a list of module names, but got 3"),
        ({"train": [""]}, TypeError, "`train` must hold module names as non-empty strings"),
        ({"train": ["re:(a+)+"]}, ValueError, "`train` has 're:"),
        ({"exclude": "head"}, TypeError, "`exclude` must be a list of module names, but got 'head'"),
    ],
)
@pytest.mark.parametrize("cls", [TuneConfig, TuneCallback])
def test_what_is_refused(cls, arguments, error, words):
    with pytest.raises(error, match=words):
        cls(**arguments)


def test_it_is_plain_data_and_round_trips():
    config = TuneConfig(("norm", "head"), exclude=("a",))
    assert config.to_dict() == {
        "exclude": ["a"],
        "also_train": None,
        "bias": "none",
        "seed": None,
        "name": "default",
        "train": ["norm", "head"],
    }
    assert TuneConfig.from_file(config.to_dict()) == config
    assert TuneConfig().difference(TuneConfig("norm")) == "`train='norm'` instead of `train='bias'`"
    assert TuneConfig().difference(TuneConfig(seed=4)) is None
