"""What the arguments of prefix tuning may be."""

import pytest

from lightning_lora.methods.prefix.config import PrefixConfig


def test_plain_data_that_makes_the_same_again():
    config = PrefixConfig(length=4, targets=("decoder",), exclude=["decoder.0"])
    assert config.to_dict()["targets"] == ["decoder"]
    assert PrefixConfig.from_file(config.to_dict()) == config


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"length": 0},
            ValueError,
            "`length` must be at least 1, but got 0. To add no prefix, leave the callback out.",
        ),
        ({"length": 2.5}, TypeError, "`length` must be an integer, but got 2.5."),
        ({"length": True}, TypeError, "`length` must be an integer, but got True."),
        ({"targets": "qv"}, ValueError, "`targets` must be 'attn' or a list .* write targets=['qv']."),
        ({"targets": []}, ValueError, "`targets` must name at least one attention block, but got []."),
        ({"targets": [1]}, TypeError, "`targets` must hold module names as non-empty strings, but got 1."),
        ({"targets": ["re:("]}, ValueError, "`targets` has 're:(', which cannot be used as a regular expression"),
        ({"exclude": "head"}, TypeError, "`exclude` must be a list of module names, but got 'head'."),
        ({"target_modules": []}, TypeError, "PrefixConfig takes no `target_modules`, which is peft's name."),
    ],
)
def test_bad_arguments(arguments, error, message):
    parts = message.split(" .* ")
    with pytest.raises(error) as caught:
        PrefixConfig(**arguments)
    assert all(part in str(caught.value) for part in parts)
