"""AmplificationFactor: table 7 of the paper with dense matrices, and random subspaces that are drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.analysis import AmplificationFactor
from tests.helpers.dense_updates import dense, norm, two_layers
from tests.helpers.layer_cases import Subject
from tests.helpers.oracles import train_by_hand


@pytest.mark.parametrize("name", ["linear", "conv2d-groups", "attention-kdim", "parameter-transposed"])
def test_against_the_formula_of_the_paper(name):
    subject, metric = Subject(name).train(), AmplificationFactor()
    metric.update(subject.model)
    for layer, each in dense(subject).items():
        count = each.svd()[1].shape[-1]
        U, _, Vh = torch.linalg.svd(each.weight, full_matrices=False)
        own = norm(U[..., :count].mT @ each.weight @ Vh.mT[..., :count])
        found = metric.compute()[layer]
        torch.testing.assert_close(found["update_directions"], each.projected().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["weight_directions"], own.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["factor"], (norm(each.delta) / each.projected()).float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found["delta_norm"], norm(each.delta).float())
        torch.testing.assert_close(found["weight_norm"], norm(each.weight).float())


@pytest.mark.slow
def test_random_directions_are_the_mean_of_drawn_ones():
    model, metric = two_layers(), AmplificationFactor()
    metric.update(model)
    weight, generator = model[0].weight.detach().double(), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(4000):
        U, V = (
            torch.linalg.qr(torch.randn(size, 3, generator=generator, dtype=torch.float64)).Q for size in weight.shape
        )
        drawn.append(norm(U.mT @ weight @ V).square())
    expected = torch.stack(drawn).mean().sqrt()
    assert float(metric.compute()["0"]["random_directions"]) == pytest.approx(float(expected), rel=0.02)


def test_a_large_weight_in_half_precision_and_the_random_stream():
    model, metric = nn.Sequential(nn.Linear(600, 640)).bfloat16(), AmplificationFactor()
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    train_by_hand(model)
    state = torch.get_rng_state()
    metric.update(model)
    assert torch.equal(state, torch.get_rng_state())
    S = torch.linalg.svdvals(model[0].weight.detach().double())
    assert float(metric.compute()["0"]["weight_directions"]) == pytest.approx(float(S[:2].norm()), rel=1e-3)


def test_without_training_and_after_a_merge():
    model, metric = nn.Sequential(nn.Linear(6, 5)), AmplificationFactor()
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    metric.update(model)
    found = metric.compute()["0"]
    assert found["factor"].isnan() and found["update_directions"] == found["weight_directions"] == 0
    train_by_hand(model)
    metric.update(model)
    live = metric.compute()["0"]
    merge_lora(model)
    metric.update(model)
    assert all(torch.equal(value, metric.compute()["0"][key]) for key, value in live.items())


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = AmplificationFactor()
    metric.update(two_layers())
    fig, ax = metric.plot()
    drawn = {line.get_label(): [float(y) for y in line.get_ydata()] for line in ax.lines}
    assert len(drawn) == 4
    for key, end in {
        "update_directions": r"directions of $\Delta W$",
        "random_directions": "random directions",
    }.items():
        (heights,) = [heights for label, heights in drawn.items() if label.endswith(end)]
        assert heights == pytest.approx([float(each[key]) for each in metric.compute().values()])
    assert ax.get_title() == "What the update amplifies"
    pyplot.close(fig)
