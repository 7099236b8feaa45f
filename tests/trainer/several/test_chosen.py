"""What a batch's choice sets on the layers: kept adapters act with it, and all that must be present has a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, use_adapters
from lightning_lora.trainer.several.chosen import ChosenAdapters
from lightning_lora.trainer.several.route import Route


class Two(nn.Module):
    """A layer that acts by its weight, and one that has a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def adapted(*targets: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two()
        for name in ("fr", "de"):
            apply_lora(model, LoRAConfig(r=2, targets=[*targets, "head"], name=name))
        for _, parameter in lora_parameters(model):
            nn.init.normal_(parameter, 0, 0.3)
    return model


def chosen(model: nn.Module, **strengths: float) -> ChosenAdapters:
    trained = [name for name in ("fr", "de") if name not in strengths]
    return ChosenAdapters(model, Route("task", ["fr", "de"]), strengths, trained)


x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("task", ["de", ["de", "de", "de"]])
def test_what_is_present_gets_zeros_and_changes_nothing(task):
    model = adapted("lstm")
    with use_adapters(model, "de"):
        expected = model(x)
    choice = chosen(model)
    choice.present = ["fr", "de"]
    choice.begin({"task": task, "x": x}, trains=True)
    output = model(x)
    output.square().sum().backward()
    choice.end()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    for name, parameter in lora_parameters(model):
        assert parameter.grad is not None and bool(parameter.grad.any()) == (".de." in name)


def test_nothing_is_present_that_need_not_be():
    model = adapted()
    choice = chosen(model)
    choice.begin({"task": "de", "x": x}, trains=True)
    model(x).sum().backward()
    assert {name for name, p in lora_parameters(model) if p.grad is None} == {
        name for name, _ in lora_parameters(model, name="fr")
    }


@pytest.mark.parametrize("targets", [(), ("lstm",)])
def test_a_loss_of_kept_adapters_alone_gives_zeros_to_those_that_train(targets):
    model = adapted(*targets)
    for _, parameter in lora_parameters(model, name="fr"):
        parameter.requires_grad_(False)
    with use_adapters(model, "fr"):
        expected = model(x)
    choice = chosen(model, fr=0.0)
    choice.begin({"task": "fr", "x": x}, trains=True)
    output = model(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    gradients = [parameter.grad for _, parameter in lora_parameters(model, name="de")]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_kept_adapters_act_with_their_strength_on_every_sample():
    model = adapted()
    choice = chosen(model, fr=0.5, it=0.0)
    choice.begin({"task": ["de", "fr", "de"], "x": x})
    output = model(x)
    choice.end()
    with use_adapters(model, [{"de": 1.0, "fr": 0.5}, "fr", {"de": 1.0, "fr": 0.5}]):
        assert torch.equal(model(x), output)
    assert choice.evaluated == {"fr", "de"}


def test_a_merged_module_runs_as_it_is_and_that_is_a_warning():
    model = adapted()
    merge_lora(model, {"fr": 1.0})
    choice = chosen(model)
    with pytest.warns(UserWarning, match=r"`route='task'` has no effect: adapters are merged"):
        choice.begin({"task": "de", "x": x})
