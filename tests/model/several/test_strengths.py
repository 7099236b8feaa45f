"""How strongly adapters act without a choice: the formula, and what follows it."""

import torch

from lightning_lora import lora_state_dict, merge_lora, use_adapters
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
