"""Adding delta so that it can be taken away again: the arithmetic, on matrices alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.ops import exact_sum as exact
from tests.helpers import oracles

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
few = settings(deadline=None, max_examples=40)


def factors(out_features, in_features, r=3, scale=0.75, size=1.0, seed=0):
    """``scale * B`` and A of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    B = size * torch.randn(out_features, r, generator=generator)
    return scale * B, torch.rand(r, in_features, generator=generator) - 0.5


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def whole_delta(matrix, pairs):
    return torch.cat([block.clone() for _, block in exact.delta_blocks(matrix, pairs)])


def summed(pairs):
    """The products in fp64 by the matrix library."""
    return sum(left.double() @ right.double() for left, right in pairs)


@pytest.mark.parametrize(
    ("dtype", "inner"), [(dtype, torch.promote_types(dtype, torch.float32)) for dtype in FLOATS], ids=str
)
def test_delta_is_the_scaled_product_in_fp32_or_better(dtype, inner):
    pairs = [factors(5, 7), factors(5, 7, r=1, scale=-2.0, seed=4)]
    delta = whole_delta(torch.zeros(5, 7, dtype=dtype), pairs)
    assert delta.dtype == inner
    oracles.assert_close(delta, summed(pairs), inner)


def test_no_adapter_adds_nothing():
    assert oracles.same_bits(whole_delta(torch.ones(2, 3), []), torch.zeros(2, 3))


@pytest.mark.parametrize("block", [1, 7, 8, 20, 35, 10**6])
def test_blocks_cover_every_row_once_and_change_no_bit(monkeypatch, block):
    pairs, matrix = [factors(5, 7)], torch.zeros(5, 7)
    expected = whole_delta(matrix, pairs)
    monkeypatch.setattr(exact, "BLOCK", block)
    pieces = [(rows, delta.clone()) for rows, delta in exact.delta_blocks(matrix, pairs)]
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == [0, 1, 2, 3, 4]
    assert len(pieces) == math.ceil(5 / max(1, block // 7))
    assert oracles.same_bits(torch.cat([delta for _, delta in pieces]), expected)


def test_delta_has_the_same_bits_under_any_setting():
    pairs, matrix = [factors(300, 200, r=8)], torch.zeros(300, 200)
    expected, threads = whole_delta(matrix, pairs), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert oracles.same_bits(whole_delta(matrix, pairs), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_rounded_once(dtype):
    matrix, pairs = noise(40, 30).to(dtype), [factors(40, 30, size=0.3)]
    expected = matrix.double() + summed(pairs)
    merged = exact.add_delta(matrix, pairs).merged
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    once = torch.finfo(dtype).eps / 2 * expected.abs() + 8 * inner
    assert merged.dtype == dtype
    assert ((merged.double() - expected).abs() <= once).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_share_of_delta_that_rounding_lost_is_told(dtype):
    matrix, pairs = noise(40, 30).to(dtype), [factors(40, 30, size=1e-2)]
    result, delta = exact.add_delta(matrix, pairs), summed(pairs)
    expected = (result.merged.double() - (matrix.double() + delta)).norm() / delta.norm()
    if dtype == torch.float64:
        assert result.lost < 1e-13
    else:
        assert result.lost == pytest.approx(float(expected), rel=0.02)


def test_a_delta_far_below_the_last_place_of_an_fp32_weight_is_told_as_lost():
    assert exact.add_delta(noise(40, 30) + 4, [factors(40, 30, size=1e-9)]).lost > 0.9


def test_nothing_is_lost_of_nothing():
    result = exact.add_delta(noise(2, 3), [factors(2, 3, size=0.0)])
    assert result.lost == 0.0
    assert oracles.same_bits(result.merged, noise(2, 3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_matrix_itself_stays_and_nearly_is_what_subtracting_gives(dtype):
    matrix, pairs = noise(40, 30).to(dtype), [factors(40, 30)]
    result = exact.add_delta(matrix, pairs)
    assert oracles.same_bits(matrix, noise(40, 30).to(dtype))
    assert oracles.same_bits(result.roundtrip, exact.subtract_delta(result.merged, pairs))
    assert not oracles.same_bits(result.merged, matrix)


def there_and_back(original, pairs):
    """What a merge and an unmerge do to a matrix; the patch between them."""
    result = exact.add_delta(original, pairs)
    patch = exact.patch_for(original, result.roundtrip)
    return exact.apply_patch(exact.subtract_delta(result.merged, pairs), patch), patch


@few
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(FLOATS),
    st.floats(-6, 4),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_any_matrix_comes_back_bit_for_bit(shape, dtype, magnitude, r, seed):
    original = oracles.any_bits(shape, dtype, seed)
    back, patch = there_and_back(original, [factors(*shape, r=r, size=10**magnitude, seed=seed)])
    assert oracles.same_bits(back, original)
    assert patch.nbytes() <= original.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30, math.inf, math.nan])
def test_special_values_come_back_bit_for_bit(dtype, size):
    original = oracles.special_values(dtype).repeat(4, 1)
    back, _ = there_and_back(original, [factors(*original.shape, size=size)])
    assert oracles.same_bits(back, original)


@pytest.mark.parametrize(
    ("dtype", "ratio", "share"),
    [
        (torch.float32, 1e-3, 0.02),
        (torch.float32, 1e-2, 0.06),
        (torch.float32, 1e-1, 0.25),
        (torch.bfloat16, 1e-3, 0.02),
        (torch.bfloat16, 1e-2, 0.06),
        (torch.bfloat16, 1e-1, 0.25),
    ],
)
def test_little_is_kept_where_delta_is_small(dtype, ratio, share):
    original = noise(128, 128).to(dtype)
    left, right = factors(128, 128)
    pairs = [(left * (ratio * original.double().norm() / summed([(left, right)]).norm()).float(), right)]
    _, patch = there_and_back(original, pairs)
    assert patch.index is not None
    assert 0 < len(patch.values) < share * original.numel()
    width = patch.values.element_size() + patch.index.element_size()
    assert patch.nbytes() == len(patch.values) * width < original.nbytes


def test_a_plain_copy_is_kept_where_delta_is_large():
    original = noise(16, 16)
    back, patch = there_and_back(original, [factors(16, 16, size=1e6)])
    assert patch.index is None
    assert patch.nbytes() == original.nbytes
    assert patch.values.data_ptr() != original.data_ptr()
    assert oracles.same_bits(back, original)


def test_patch_holds_exactly_the_elements_whose_bits_differ():
    original = torch.tensor([[0.0, 1.0, math.nan], [3.0, -0.0, 5.0], [6.0, 7.0, 8.0]])
    nearly = torch.tensor([[0.0, 1.5, math.nan], [3.0, 0.0, 5.0], [6.0, 7.0, 8.0]])
    patch = exact.patch_for(original, nearly)
    assert patch.index.tolist() == [1, 4]
    assert oracles.same_bits(patch.values, torch.tensor([1.0, -0.0]))
    assert patch.nbytes() == 16
    assert oracles.same_bits(exact.apply_patch(nearly, patch), original)


def test_patch_of_equal_matrices_is_empty():
    patch = exact.patch_for(torch.ones(3, 3), torch.ones(3, 3))
    assert patch.nbytes() == 0
    assert oracles.same_bits(exact.apply_patch(torch.ones(3, 3), patch), torch.ones(3, 3))


def test_a_patch_shares_no_memory_with_the_matrix():
    original, nearly = torch.ones(2, 2), torch.zeros(2, 2)
    patch = exact.patch_for(original, nearly)
    original.zero_()
    assert patch.values.tolist() == [[1, 1], [1, 1]]
