"""Combinations of updates against the same written out on dense matrices, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_lora.ops.combination import KINDS, disjoint_mean, rescaled, trimmed


def updates(count=3, out_features=9, in_features=7, r=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [((out_features, r + i), (r + i, in_features)) for i in range(count)]
    return [tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in pair) for pair in shapes]


def dense(pairs):
    return [(B @ A).numpy() for B, A in pairs]


def nearest(matrix, r):
    U, S, V = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * S[:r]) @ V[:r], float((S[:r] ** 2).sum() / (S**2).sum())


def combined(kind, pairs, r, density=0.5, generators=()):
    result = KINDS[kind](pairs, r, density, generators)
    assert result.A.shape[0] == result.B.shape[1] == r
    assert result.A.dtype == result.B.dtype == torch.float32
    return (result.B.double() @ result.A.double()).numpy(), result.energy


def ties_written_out(deltas, density):
    kept = []
    for delta in deltas:
        order = np.argsort(-np.abs(delta), axis=None)[: round(density * delta.size)]
        mask = np.zeros(delta.size, dtype=bool)
        mask[order] = True
        kept.append(np.where(mask.reshape(delta.shape), delta, 0))
    result = np.zeros_like(deltas[0])
    for place in np.ndindex(result.shape):
        values = [delta[place] for delta in kept]
        agreeing = [value for value in values if value and (value > 0) == (sum(values) > 0)]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


def dare_written_out(deltas, density, seeds):
    total = np.zeros_like(deltas[0])
    for delta, seed in zip(deltas, seeds, strict=True):
        random = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        total += np.where(random < density, delta / density, 0)
    return total


def test_cat_is_the_sum():
    pairs = updates()
    value, energy = combined("cat", pairs, 9)
    assert np.allclose(value, sum(dense(pairs)), atol=1e-5)
    assert energy == 1.0


@pytest.mark.parametrize("r", [1, 4, 7, 12])  # of a sum of rank 7
def test_svd_is_the_nearest_to_the_sum(r):
    pairs = updates()
    value, energy = combined("svd", pairs, r)
    expected, share = nearest(sum(dense(pairs)), r)
    assert np.allclose(value, expected, atol=1e-5)
    assert energy == pytest.approx(share)


def test_svd_of_updates_that_are_wider_than_the_matrix():
    pairs = updates(count=6, out_features=3, in_features=4)
    assert np.allclose(combined("svd", pairs, 2)[0], nearest(sum(dense(pairs)), 2)[0], atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(density):
    pairs = updates()
    value, energy = combined("ties", pairs, 3, density)
    expected, share = nearest(ties_written_out(dense(pairs), density), 3)
    assert np.allclose(value, expected, atol=1e-5)
    assert energy == pytest.approx(share)


def test_ties_of_one_update_at_full_density_is_that_update():
    (pair,) = updates(count=1)
    assert np.allclose(combined("ties", [pair], 2, 1.0)[0], dense([pair])[0], atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dare(density):
    pairs = updates()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    value, _ = combined("dare", pairs, 3, density, generators)
    expected, _ = nearest(dare_written_out(dense(pairs), density, (5, 6, 7)), 3)
    assert np.allclose(value, expected, atol=1e-5)


def test_at_least_one_element_is_kept():
    delta = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    assert trimmed(delta, 0.01).tolist() == [[0.0, -3.0], [0.0, 0.0]]


def test_signs_that_cancel_give_zero():
    deltas = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[-1.0, 4.0, 0.0]]), torch.tensor([[0.0, -1.0, 5.0]])]
    assert disjoint_mean(deltas).tolist() == [[0.0, 3.0, 5.0]]


def test_the_expectation_of_dare_is_the_update():
    delta, generator = torch.ones(400, 500), torch.Generator().manual_seed(0)
    assert float(rescaled(delta, 0.25, generator).mean()) == pytest.approx(1.0, abs=0.02)
