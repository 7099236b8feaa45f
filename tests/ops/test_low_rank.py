"""Truncated SVD against the full one of torch."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.ops.low_rank import FULL_SVD, truncated_svd


def spectrum(out_features, in_features, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = min(out_features, in_features)
    U, _ = torch.linalg.qr(torch.randn(out_features, count, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(in_features, count, generator=generator))
    return (U * values(torch.arange(count) + 1.0)) @ V.T


SPECTRA = {"fast": lambda k: 0.8**k, "slow": lambda k: k**-0.5, "flat": torch.ones_like}


@pytest.mark.parametrize(
    "shape",
    [(40, 30), (30, 40), (5, 900), (FULL_SVD + 40, FULL_SVD + 90), (FULL_SVD + 90, FULL_SVD + 40)],
)
@pytest.mark.parametrize("kind", SPECTRA)
def test_as_the_full_svd(shape, kind):
    matrix, r = spectrum(*shape, SPECTRA[kind]), 8
    S = torch.linalg.svdvals(matrix.double())
    best = float(S[:r].square().sum() / S.square().sum())
    found = truncated_svd(matrix, r)
    product = found.B.double() @ found.A.double()
    kept = 1 - float((matrix - product).norm() / matrix.norm()) ** 2
    assert found.energy == pytest.approx(kept, abs=1e-5), "what it says is what it keeps"
    large = min(shape) > FULL_SVD
    assert kept <= best + 1e-6
    assert kept >= best * (1 - (1e-3 if large and kind == "flat" else 1e-5))
    assert (found.A.dtype, found.B.dtype) == (torch.float32, torch.float32)
    assert (found.A.shape, found.B.shape) == ((r, shape[1]), (shape[0], r))


def test_a_matrix_of_low_rank_comes_back():
    generator = torch.Generator().manual_seed(0)
    for size in (60, FULL_SVD + 20):
        matrix = torch.randn(size, 4, generator=generator) @ torch.randn(4, size + 5, generator=generator)
        found = truncated_svd(matrix, 4)
        torch.testing.assert_close(found.B @ found.A, matrix, rtol=1e-4, atol=1e-4)
        assert found.energy == pytest.approx(1)


def test_more_rank_than_the_matrix_has_rows_is_zero_there():
    found = truncated_svd(torch.ones(2, 3), 5)
    assert (found.A.shape, found.B.shape) == ((5, 3), (2, 5))
    torch.testing.assert_close(found.B @ found.A, torch.ones(2, 3))
    assert not found.A[2:].any()


def test_zero_and_the_global_random_stream():
    before = torch.get_rng_state()
    found = truncated_svd(torch.zeros(FULL_SVD + 20, FULL_SVD + 20), 2)
    assert found.energy == 1 and not (found.B @ found.A).any()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_random_stream_of_the_gpu_is_not_used():
    matrix, before = torch.randn(600, 700, device="cuda"), torch.cuda.get_rng_state()
    first, second = truncated_svd(matrix, 2), truncated_svd(matrix, 2)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(first.A, second.A)


def test_the_same_twice():
    matrix = spectrum(FULL_SVD + 30, FULL_SVD + 10, SPECTRA["slow"])
    assert torch.equal(truncated_svd(matrix, 3).A, truncated_svd(matrix, 3).A)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("white", 0.999), ("power", 0.99999), ("noisy", 0.99999)])
def test_the_energy_of_large_matrices_is_that_of_the_full_svd(kind, share):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(FULL_SVD + 200, FULL_SVD + 300, generator=generator)
    low_rank = torch.randn(FULL_SVD + 200, 8, generator=generator) @ torch.randn(8, FULL_SVD + 300, generator=generator)
    power = spectrum(FULL_SVD + 200, FULL_SVD + 300, SPECTRA["slow"])
    matrix = {"white": noise, "power": power, "noisy": low_rank / 4 + noise}[kind]
    S = torch.linalg.svdvals(matrix.double())
    best = float(S[:8].square().sum() / S.square().sum())
    assert share * best <= truncated_svd(matrix, 8).energy <= best * (1 + 1e-6)
