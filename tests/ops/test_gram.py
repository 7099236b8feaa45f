"""Norms of low-rank products against the products themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.ops.low_rank import cosine, distance, inner, norm


def drawn(out_features, in_features, r, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator) for shape in ((out_features, r), (r, in_features))]
    return draw[0], draw[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_as_the_products(out_features, in_features, r, other_r, seed):
    one, other = drawn(out_features, in_features, r, seed), drawn(out_features, in_features, other_r, seed + 1000)
    D, E = (B.double() @ A.double() for B, A in (one, other))
    assert norm(one) == pytest.approx(float(D.norm()), rel=1e-10)
    assert inner(one, other) == pytest.approx(float((D * E).sum()), rel=1e-9, abs=1e-9)
    assert distance(one, other) == pytest.approx(float((D - E).norm()), rel=1e-10)
    assert cosine(one, other) == pytest.approx(float((D * E).sum() / D.norm() / E.norm()), abs=1e-10)


def test_near_deltas_keep_their_digits():
    B, A = drawn(50, 60, 4, 0)
    moved = B.double() + 1e-11 * torch.ones(50, 4, dtype=torch.float64)
    expected = float(((moved - B.double()) @ A.double()).norm())
    assert distance((B, A), (moved, A)) == pytest.approx(expected, rel=1e-3)


def test_zero_has_no_angle():
    B, A = drawn(5, 6, 2, 0)
    assert cosine((B, A), (B * 0, A)) is None
    assert norm((B * 0, A)) == 0
