"""What a plan says about the sides of the equation."""

import pytest
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, plan_lora
from lightning_lora.layers.sums.sizes import MAX_WORK

ACTIVATIONS, WEIGHTS = "Layers compute W0 x + scale B (A x)", "Layers compute (W0 + scale B A) x"


def last_lines(compute, *layers, **arguments):
    config = LoRAConfig(r=2, targets=[str(i) for i in range(len(layers))], **arguments)
    return plan_lora(nn.Sequential(*layers), config, compute=compute).remarks[-1]


@pytest.mark.parametrize(
    ("compute", "dropout", "words"),
    [
        ("activations", 0.0, f"{ACTIVATIONS}."),
        ("auto", 0.1, f"{ACTIVATIONS}, as dropout needs."),
        ("weights", 0.0, f"{WEIGHTS}."),
    ],
)
def test_the_side_that_is_named(compute, dropout, words):
    assert last_lines(compute, nn.Linear(8, 8), dropout=dropout) == words


def test_auto_gives_the_limits_by_size():
    text = last_lines("auto", nn.Linear(64, 64), nn.Linear(256, 64))
    assert f"of up to {MAX_WORK // (256 * 64):,} rows ({MAX_WORK // 64**2:,} for the smallest weight)" in text
    assert text.endswith("otherwise W0 x + scale B (A x).")


def test_layers_of_other_kinds_are_counted():
    text = last_lines("weights", nn.Linear(8, 8), nn.Embedding(8, 8))
    assert text == f"{WEIGHTS}.\n`compute` has no effect on 1 of 2 layers."


def test_a_weight_that_is_too_large_for_the_sum():
    layer = nn.Linear(2**13, 2**13, device="meta")
    assert last_lines("auto", layer) == f"{ACTIVATIONS}."


def test_a_model_whose_sums_are_too_large():
    layers = [nn.Linear(2**12, 2**12, device="meta") for _ in range(49)]  # 49 * 2**26 bytes in fp32
    assert last_lines("auto", *layers[:48]).startswith(f"On a GPU l{WEIGHTS[1:]} for inputs of up to")
    assert last_lines("auto", *layers) == f"{ACTIVATIONS}: the sums of all weights would take too much memory."


def test_a_callback_brings_its_own_and_a_configuration_says_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    callback = LoRACallback(r=2, targets="all", compute="weights")
    assert plan_lora(model, callback).remarks == [f"{WEIGHTS}."]
    assert plan_lora(model, callback.config).remarks == []


def test_weights_with_dropout_are_refused():
    with pytest.raises(ValueError, match="`compute='weights'` sums W0 and B A, so A has no input of its own to drop"):
        last_lines("weights", nn.Linear(4, 4), dropout=0.1)
