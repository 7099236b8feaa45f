"""How strongly adapters act without a choice: the formula, and what follows it."""

import pytest
import torch

from lightning_lora import combine_adapters, lora_state_dict, merge_lora, remove_lora, use_adapters
from lightning_lora.model.several.strengths import set_strengths, strengths_of
from tests.helpers.models import net
from tests.helpers.several import THREE, outputs, with_adapters

X = torch.linspace(-1, 1, 80).reshape(5, 16)
STRENGTHS = {"fr": 0.0, "de": -0.5}


def test_adapters_act_as_strongly_as_they_are_set():
    model = with_adapters(net())
    with use_adapters(model, {**STRENGTHS, "es": 1.0}):
        expected = outputs(model, X)
    set_strengths(model, STRENGTHS)
    assert strengths_of(model) == {"fr": 0.0, "de": -0.5, "es": 1.0}
    assert torch.equal(outputs(model, X), expected)
    set_strengths(model, dict.fromkeys(THREE, 1.0))
    assert torch.equal(outputs(model, X), outputs(with_adapters(net()), X))


def test_a_merge_follows_them():
    model = with_adapters(net())
    weight, state = model.layers[0].q.weight.detach().clone(), lora_state_dict(model)
    set_strengths(model, STRENGTHS)
    scale = {name: model.layers[0].q.lora[name].scale for name in THREE}
    merge_lora(model)
    for name, c in {**STRENGTHS, "es": 1.0}.items():
        A, B = (state[f"layers.0.q.lora.{name}.{letter}"] for letter in "AB")
        weight = weight + c * scale[name] * B @ A
    assert torch.allclose(model.layers[0].q.weight, weight, atol=1e-6)


def test_nothing_is_merged_where_all_rest_and_that_is_an_error():
    model = with_adapters(net())
    set_strengths(model, dict.fromkeys(THREE, 0.0))
    with pytest.raises(ValueError, match=r"Every adapter of the model rests \(`fr`, `de`, `es`\).*\{'fr': 1.0\}"):
        merge_lora(model)
    with use_adapters(model, "fr"):
        expected = outputs(model, X)
    merge_lora(model, {"fr": 1.0})
    assert torch.allclose(outputs(model, X), expected, atol=1e-5)


def test_without_the_only_one_that_acts_the_others_act_again():
    model = with_adapters(net())
    expected = outputs(model, X)
    combine_adapters(model, {"fr": 0.5, "de": 0.5}, "mix")
    remove_lora(model, name="mix")
    assert torch.equal(outputs(model, X), expected)
    set_strengths(model, STRENGTHS)
    remove_lora(model, name="es")
    assert strengths_of(model) == STRENGTHS, "`de` still acts"


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(factor):
    model = with_adapters(net())
    with pytest.raises(ValueError, match=r"`weights\['fr'\]` must be finite, but got (nan|inf)"):
        merge_lora(model, {"fr": factor})
    for adapters in ({"fr": factor}, ["de", {"fr": factor}]):
        with pytest.raises(ValueError, match=r"`adapters\['fr'\]` must be finite"), use_adapters(model, adapters):
            pass
