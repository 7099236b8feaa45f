"""Adding delta so that it can be taken away again: the arithmetic, on matrices alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.ops import exact_sum as exact
from lightning_lora.ops.exact_product import exact_product
from lightning_lora.ops.workspace import Workspace
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


def inner(dtype):
    return torch.promote_types(dtype, torch.float32)


def delta_for(matrix, pairs):
    return exact_product(pairs, inner(matrix.dtype))


def add(matrix, pairs, workspace=None):
    out = torch.empty_like(matrix)
    return out, exact.add_delta(matrix, delta_for(matrix, pairs), out, workspace or Workspace())


def merge(matrix, pairs, workspace=None):
    out = torch.empty_like(matrix)
    patch, squares = exact.merge_delta(matrix, delta_for(matrix, pairs), out, workspace or Workspace())
    return out, patch, squares


def subtract(matrix, pairs, workspace=None):
    return exact.subtract_delta(matrix, delta_for(matrix, pairs), torch.empty_like(matrix), workspace or Workspace())


def summed(pairs):
    """The products in fp64 by the matrix library."""
    return sum(left.double() @ right.double() for left, right in pairs)


def written_out(matrix, pairs, sign=1):
    """The sum, element by element: delta rounded to fp32 or fp64, added, and rounded."""
    delta = sum(left @ right for left, right in delta_for(matrix, pairs).terms).to(inner(matrix.dtype))
    return (matrix.to(delta.dtype) + sign * delta).to(matrix.dtype)


PAIRS = [factors(5, 7), factors(5, 7, r=1, scale=-2.0, seed=4)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_delta_is_the_scaled_product_in_fp32_or_better(dtype):
    zeros = torch.zeros(5, 7, dtype=inner(dtype))
    oracles.assert_close(add(zeros, PAIRS)[0], summed(PAIRS), inner(dtype))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [1, 7, 8, 20, 35, 10**6])
def test_neither_blocks_nor_threads_change_a_bit(monkeypatch, threads, block, dtype):
    matrix = noise(5, 7).to(dtype)
    monkeypatch.setattr(exact, "ON_CPU", block)
    merged, patch, squares = merge(matrix, PAIRS)
    assert oracles.same_bits(merged, written_out(matrix, PAIRS))
    assert oracles.same_bits(add(matrix, PAIRS)[0], merged)
    restored = subtract(merged, PAIRS)
    assert oracles.same_bits(restored, written_out(merged, PAIRS, sign=-1))
    whole = exact.patch_for(matrix, restored)
    assert oracles.same_bits(patch.values, whole.values)
    assert (patch.index is None) == (whole.index is None)
    assert patch.index is None or torch.equal(patch.index, whole.index)
    assert math.sqrt(squares.delta) == pytest.approx(float(summed(PAIRS).norm()), rel=1e-5)


def test_the_sum_has_the_same_bits_under_any_setting(threads):
    pairs, matrix = [factors(300, 200, r=8)], noise(300, 200)
    expected, precision = written_out(matrix, pairs), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert oracles.same_bits(add(matrix, pairs)[0], expected)
        with torch.inference_mode():
            assert oracles.same_bits(add(matrix, pairs)[0], expected)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gpu_computes_the_same_bits(monkeypatch, dtype):
    monkeypatch.setattr(exact, "ON_DEVICE", 1000)
    pairs, matrix = [factors(300, 200, r=8)], noise(300, 200).to(dtype)
    merged, patch, _ = merge(matrix, pairs)
    on_gpu = [(left.cuda(), right.cuda()) for left, right in pairs]
    merged_there, patch_there, _ = merge(matrix.cuda(), on_gpu)
    assert oracles.same_bits(merged_there.cpu(), merged)
    assert oracles.same_bits(patch_there.values, patch.values)
    assert torch.equal(patch_there.index, patch.index)
    assert oracles.same_bits(exact.apply_patch(subtract(merged_there, on_gpu), patch).cpu(), matrix)
    assert oracles.same_bits(exact.apply_patch(subtract(merged, pairs), patch_there), matrix)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_rounded_once(dtype):
    matrix, pairs = noise(40, 30).to(dtype), [factors(40, 30, size=0.3)]
    expected, (merged, _) = matrix.double() + summed(pairs), add(matrix, pairs)
    once = torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(inner(dtype)).eps
    assert merged.dtype == dtype
    assert ((merged.double() - expected).abs() <= once).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_share_of_delta_that_rounding_lost_is_told(dtype):
    matrix, pairs = noise(40, 30).to(dtype), [factors(40, 30, size=1e-2)]
    (merged, squares), delta = add(matrix, pairs), summed(pairs)
    expected = (merged.double() - (matrix.double() + delta)).norm() / delta.norm()
    assert replace(merge(matrix, pairs)[2], matrix=squares.matrix) == squares
    if dtype == torch.float64:
        assert squares.lost() < 1e-13
    else:
        assert squares.lost() == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("size", [1e-18, 1e18], ids=["squares below fp32", "squares above fp32"])
def test_the_share_is_right_where_fp32_cannot_hold_the_squares(size):
    left, right = factors(40, 30)
    pairs = [(left * size, right)]
    _, squares = add(noise(40, 30) * size, pairs)
    assert squares.lost() == pytest.approx(add(noise(40, 30), [(left, right)])[1].lost(), rel=0.05)
    assert math.sqrt(squares.delta) == pytest.approx(float(summed(pairs).norm()), rel=1e-5)


def test_a_delta_far_below_the_last_place_of_an_fp32_weight_is_told_as_lost():
    assert add(noise(40, 30) + 4, [factors(40, 30, size=1e-9)])[1].lost() > 0.9


def test_nothing_is_lost_of_nothing():
    merged, squares = add(noise(2, 3), [factors(2, 3, size=0.0)])
    assert squares.lost() == 0.0
    assert oracles.same_bits(merged, noise(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_loses_nothing_and_is_found(threads, monkeypatch, bad):
    monkeypatch.setattr(exact, "ON_CPU", 100)
    matrix, pairs = noise(40, 30), [factors(40, 30)]
    _, expected = add(matrix, pairs)
    assert expected.finite
    assert math.sqrt(expected.matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-6)
    matrix[17, 3] = bad
    _, squares = add(matrix, pairs)
    assert not squares.finite
    assert squares.lost() == pytest.approx(expected.lost(), rel=0.01)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_that_is_no_number_has_the_bits_of_one_nan(dtype):
    """A CPU and a GPU compute NaNs of different bits."""
    matrix = torch.zeros(4, 2, dtype=dtype)
    matrix[1, 0], matrix[2, 0] = -math.inf, math.inf
    exact.as_integers(matrix)[0, 0] = -1  # a NaN with every bit set
    pairs = [(torch.tensor([[1.0], [math.inf], [1.0], [math.nan]]), torch.ones(1, 2))]
    for merged in (add(matrix, pairs)[0], merge(matrix, pairs)[0]):
        assert merged.isnan().any(1).tolist() == [True, True, False, True]
        numbers = merged[merged.isnan()]
        assert oracles.same_bits(numbers, torch.full_like(numbers, math.nan))


def test_an_overflow_is_found():
    matrix = torch.full((2, 2), 6e4, dtype=torch.float16)
    assert add(matrix, [(torch.ones(2, 1), torch.ones(1, 2))])[1].finite
    assert not add(matrix, [(torch.ones(2, 1), torch.full((1, 2), 6e4))])[1].finite


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_matrix_itself_stays(dtype):
    matrix = noise(40, 30).to(dtype)
    merged, _, _ = merge(matrix, [factors(40, 30)])
    assert oracles.same_bits(matrix, noise(40, 30).to(dtype))
    assert not oracles.same_bits(merged, matrix)


def test_the_memory_of_a_workspace_may_be_used_again_and_again():
    workspace, cases = Workspace(), [(noise(40, 30), [factors(40, 30)]), (noise(9, 70).half(), [factors(9, 70)])]
    merged = [merge(*case, workspace) for case in cases]
    for (matrix, pairs), (total, patch, _) in zip(cases, merged, strict=True):
        assert oracles.same_bits(total, written_out(matrix, pairs))
        assert oracles.same_bits(exact.apply_patch(subtract(total, pairs, workspace), patch), matrix)


def there_and_back(original, pairs):
    """What a merge and an unmerge do to a matrix; the patch between them."""
    merged, patch, _ = merge(original, pairs)
    return exact.apply_patch(subtract(merged, pairs), patch), patch


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
    patch = exact.patch_for(original, nearly.clone())
    assert patch.index.tolist() == [1, 2, 4]  # a NaN too: another device may compute another one
    assert oracles.same_bits(patch.values, torch.tensor([1.0, math.nan, -0.0]))
    assert patch.nbytes() == 24
    assert oracles.same_bits(exact.apply_patch(nearly, patch), original)


def test_patch_of_equal_matrices_is_empty():
    patch = exact.patch_for(torch.ones(3, 3), torch.ones(3, 3))
    assert patch.nbytes() == 0
    assert oracles.same_bits(exact.apply_patch(torch.ones(3, 3), patch), torch.ones(3, 3))


def test_a_patch_shares_no_memory_with_the_matrix():
    original, nearly = torch.ones(2, 2), torch.zeros(2, 2)
    patch = exact.patch_for(original, nearly.clone())
    original.zero_()
    assert patch.values.tolist() == [[1, 1], [1, 1]]
