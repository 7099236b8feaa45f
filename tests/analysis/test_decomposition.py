"""Singular values and directions of r x r matrices: those of the dense product."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.analysis.decomposition import core_of, directions, grams, singular_values


def factors(*stack, out=9, r=4, in_features=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(*stack, out, r, generator=generator, dtype=torch.float64)
    return B, torch.randn(*stack, r, in_features, generator=generator, dtype=torch.float64)


CASES = {
    "plain": factors(),
    "stacked": factors(3),
    "one direction": factors(r=1),
    "r above the features": factors(out=3, r=8, in_features=5),
    "one output": factors(out=1),
}


@pytest.mark.parametrize("case", CASES)
def test_singular_values_are_those_of_the_product(case):
    B, A = CASES[case]
    expected = torch.linalg.svdvals(B @ A)[..., : A.shape[-2]]
    torch.testing.assert_close(singular_values((B, A)), expected, rtol=1e-12, atol=1e-13)


def test_small_singular_values_are_precise():
    B, A = torch.linalg.qr(factors()[0]).Q, torch.linalg.qr(factors()[1].mT).Q.mT
    sizes = torch.tensor([1.0, 1e-4, 1e-8, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(singular_values((B * sizes, A)), sizes, rtol=1e-3, atol=0)


def rebuilt(B, A):
    """Delta from the decomposition of the Gram matrices, and how far U and V are from orthonormal."""
    r = A.shape[-2]
    core = core_of([grams((B, A), r)])
    left, right, S = (each.reshape(*B.shape[:-2], *each.shape[1:]) for each in (core.left, core.right, core.S))
    U, V = B @ left, A.mT @ right
    count = core.directions().view(B.shape[:-2])
    ones = (torch.arange(r) < count[..., None]).double().diag_embed()
    apart = max(float((side.mT @ side - ones).abs().max()) for side in (U, V))
    return (U * S[..., None, :]) @ V.mT, apart, count


@pytest.mark.parametrize("case", CASES)
def test_the_core_gives_singular_directions(case):
    B, A = CASES[case]
    product, apart, count = rebuilt(B, A)
    torch.testing.assert_close(product, B @ A, rtol=1e-9, atol=1e-10)
    assert apart < 1e-6
    assert (count == torch.linalg.matrix_rank(B @ A)).all()


def test_directions_without_a_singular_value_are_left_out():
    B, A = factors()
    B[:, 2] = B[:, 1]  # rank 3
    product, apart, count = rebuilt(B, A)
    torch.testing.assert_close(product, B @ A, rtol=1e-9, atol=1e-10)
    assert (apart < 1e-6, int(count)) == (True, 3)
    assert int(rebuilt(0 * B, A)[2]) == 0 and not rebuilt(0 * B, A)[0].any()


def test_cores_of_several_ranks_are_computed_together():
    small, large = factors(r=2), factors(2, r=5, out=20)
    core = core_of([grams(small, 5), grams(large, 5)])
    torch.testing.assert_close(core.S[0, :2], singular_values(small), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(core.S[1:], singular_values(large), rtol=1e-6, atol=1e-9)
    assert core.directions().tolist() == [2, 5, 5] and not core.left[0, 2:].any()


def test_nan_and_infinity_give_nan():
    B, A = factors(2)
    B[0, 0, 0] = torch.inf
    assert singular_values((B, A)).isnan().all(-1).tolist() == [True, False]
    core = core_of([grams((B, A), 4)])
    assert core.S.isnan().all(-1).tolist() == [True, False] and core.directions().tolist() == [0, 4]
    assert directions(B).isnan().all(-1).all(-1).tolist() == [True, False]


def test_directions_of_a_matrix():
    B, _ = factors()
    found = directions(B)
    expected = torch.linalg.svd(B, full_matrices=False).U
    torch.testing.assert_close((found.mT @ expected).abs(), torch.eye(4, dtype=torch.float64))
    B[:, 3] = 0
    assert directions(B).isnan().any(0).tolist() == [False, False, False, True]
    assert directions(torch.zeros(5, 2)).isnan().all()
