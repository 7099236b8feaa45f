"""Norms of updates and weights: a dense SVD of delta is the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.analysis import measures
from lightning_lora.analysis.measures import amplification_of, measure, ratio_of, stable_rank_of
from tests.helpers.dense_updates import dense, norm, two_layers
from tests.helpers.layer_cases import LAYER_CASES, Subject
from tests.helpers.oracles import train_by_hand
from tests.helpers.selection import slow_except

FAST = {"linear-fp64", "linear-bf16", "embedding", "conv2d-groups", "attention-kdim", "parameter-transposed"}


@pytest.mark.parametrize("name", slow_except(FAST, LAYER_CASES))
def test_against_a_dense_svd(name):
    subject = Subject(name).train()
    expected, found = dense(subject), measure(subject.model)
    assert list(found) == [name for name in found if name in expected] and len(found) == len(expected)
    for name, each in found.items():
        oracle = expected[name]
        _, S, _ = oracle.svd()
        torch.testing.assert_close(each.delta, norm(oracle.delta))
        torch.testing.assert_close(each.largest, S[..., 0])
        torch.testing.assert_close(each.weight, norm(oracle.weight))
        torch.testing.assert_close(each.projected, oracle.projected(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(each.ratio, norm(oracle.delta) / norm(oracle.weight))
        torch.testing.assert_close(each.stable_rank, S.square().sum(-1) / S[..., 0].square())
        torch.testing.assert_close(each.amplification, norm(oracle.delta) / oracle.projected(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear-bf16", "attention-self", "parameter-indexed"])
def test_a_merge_changes_no_measure(name):
    subject = Subject(name).train()
    before = measure(subject.model)
    merge_lora(subject.model)
    after = measure(subject.model)
    assert before.keys() == after.keys()
    for layer, each in before.items():
        assert all(torch.equal(value, vars(after[layer])[key]) for key, value in vars(each).items())


def test_without_training_delta_is_zero():
    model = nn.Sequential(nn.Linear(6, 5))
    apply_lora(model, LoRAConfig(r=2, targets=["0"]))
    found = measure(model)["0"]
    assert (found.delta, found.largest, found.projected, found.directions, found.ratio) == (0, 0, 0, 0, 0)
    assert found.stable_rank.isnan() and found.amplification.isnan()
    assert math.isnan(amplification_of([found])) and math.isnan(stable_rank_of([found])) and ratio_of([found]) == 0


def test_a_diverged_run_is_measured():
    model = two_layers()
    with torch.no_grad():
        model[0].lora["default"].B[0, 0] = torch.nan
    found = measure(model)
    assert found["0"].delta.isnan() and found["0"].ratio.isnan() and found["1"].delta.isfinite()


def test_a_rank_above_the_features():
    model = nn.Sequential(nn.Linear(3, 4))
    apply_lora(model, LoRAConfig(r=16, targets=["0"]))
    train_by_hand(model)
    found, weight = measure(model)["0"], model[0].weight.detach().double()
    assert found.directions == 3
    torch.testing.assert_close(found.projected, norm(projector(model) @ weight), rtol=1e-6, atol=0)


def projector(model: nn.Module) -> torch.Tensor:
    """On the columns of delta; its rows are all three features."""
    pair = model[0].lora["default"]
    return torch.linalg.svd((pair.B @ pair.A).detach().double(), full_matrices=False).U.mT


def test_of_all_layers_together():
    found = list(measure(two_layers(rank_pattern={"1": 2})).values())
    delta, weight, projected = (
        torch.stack([getattr(each, key) for each in found]) for key in ("delta", "weight", "projected")
    )
    assert ratio_of(found) == pytest.approx(float(delta.norm() / weight.norm()))
    assert amplification_of(found) == pytest.approx(float(delta.norm() / projected.norm()))
    assert stable_rank_of(found) == pytest.approx(float(sum(each.stable_rank for each in found) / 2))
    assert ratio_of(found[:1]) == pytest.approx(float(found[0].ratio))


def test_of_the_experts_of_a_stack():
    (each, _) = measure(Subject("parameter-indexed").train().model).values()
    assert each.ratio.shape == (3,)
    assert ratio_of([each]) == pytest.approx(float(each.delta.norm() / each.weight.norm()))
    assert stable_rank_of([each]) == pytest.approx(float(each.stable_rank.mean()))


def test_norms_of_weights_are_computed_once(monkeypatch):
    model, norms = two_layers(), {}
    first = measure(model, weight_norms=norms)
    assert norms.keys() == {"0", "1"}
    shapes, computed = [], measures._norms
    monkeypatch.setattr(measures, "_norms", lambda matrix: shapes.append(tuple(matrix.shape)) or computed(matrix))
    second = measure(model, weight_norms=norms)
    assert shapes == [(3, 3), (3, 3)]  # of U^T W V alone
    assert all(torch.equal(first[name].weight, second[name].weight) for name in first)


def test_autocast_does_not_change_the_precision():
    model = two_layers()
    plain = measure(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(model)
    assert all(torch.equal(plain[name].projected, cast[name].projected) for name in plain)


def test_blocks_of_rows_in_half_precision(monkeypatch):
    subject = Subject("linear-bf16").train()
    whole = measure(subject.model)["layer"].projected
    monkeypatch.setattr(measures, "ROWS", 2)
    torch.testing.assert_close(measure(subject.model)["layer"].projected, whole, rtol=1e-6, atol=0)
