"""What all metrics of updates have from torchmetrics: state, reset, forward, copies, and one value over ranks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_lora.analysis import AmplificationFactor, SubspaceSimilarity, UpdateRatio, UpdateSpectrum
from lightning_lora.analysis.metric import of_first_rank
from tests.helpers.dense_updates import two_layers


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("metric", [UpdateSpectrum(), UpdateRatio(), AmplificationFactor()], ids=repr)
def test_the_last_update_counts(metric):
    first, second = two_layers(), two_layers(seed=5)
    metric.update(first)
    before = metric.compute()
    assert equal(metric(second), metric.compute()) and not equal(before, metric.compute())
    metric.update(first)
    assert equal(before, metric.compute())
    metric.update(first[0])
    assert metric.compute().keys() == {"weight"}
    metric.reset()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute() == {}


@pytest.mark.parametrize("metric", [UpdateSpectrum(), UpdateRatio(), AmplificationFactor()], ids=repr)
def test_it_is_copied_and_pickled_without_the_model(metric):
    metric.update(two_layers())
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert equal(twin.compute(), metric.compute())
    assert len(pickle.dumps(metric)) < 10_000


def test_it_does_not_sum_over_ranks():
    ranks = 3
    metric = UpdateRatio(
        sync_on_compute=True,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda value, group=None: [value] * ranks,
    )
    alone = UpdateRatio()
    for each in (metric, alone):
        each.update(two_layers())
    assert equal(metric.compute(), alone.compute())
    assert torch.equal(of_first_rank(torch.tensor([[1.0], [2.0]])), torch.tensor([1.0]))


def test_in_a_collection():
    model = two_layers()
    collection = MetricCollection({"ratio": UpdateRatio(), "spectrum": UpdateSpectrum()})
    collection.update(model)
    collection.update(model)
    alone = UpdateRatio()
    alone.update(model)
    assert equal(collection["ratio"].compute(), alone.compute())
    assert collection["spectrum"].compute()["0"].shape == (3,)


def test_numbers_are_on_the_device_and_in_the_dtype_of_a_metric():
    metric = SubspaceSimilarity()
    metric.update(two_layers(), two_layers(seed=2))
    assert metric.compute()["0"].dtype == torch.float32 and metric.compute()["0"].device == metric.device
