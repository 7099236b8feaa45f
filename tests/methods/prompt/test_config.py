"""What the arguments of prompt tuning may be."""

import pytest

from lightning_lora.methods.prompt.config import PromptConfig


def test_plain_data_that_makes_the_same_again():
    config = PromptConfig(length=4, deep=True, exclude=("decoder",))
    assert config.to_dict()["exclude"] == ["decoder"]
    assert PromptConfig.from_file(config.to_dict()) == config
    assert config.difference(PromptConfig(length=4, exclude=["decoder"])) == "`deep=False` instead of `deep=True`"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"length": 0},
            ValueError,
            "`length` must be at least 1, but got 0. To add no prompt, leave the callback out.",
        ),
        ({"length": "8"}, TypeError, "`length` must be an integer, but got '8'."),
        ({"deep": 1}, TypeError, "`deep` must be a bool, but got 1."),
        ({"exclude": "head"}, TypeError, "`exclude` must be a list of module names, but got 'head'."),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        PromptConfig(**arguments)
    assert str(caught.value) == message
