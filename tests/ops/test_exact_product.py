"""Products whose bits no order of summation changes, against fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.ops.exact_product import exact_product
from tests.helpers.oracles import same_bits

DTYPES = [torch.float32, torch.float64]
few = settings(deadline=None, max_examples=30)


def factors(rows=7, columns=6, r=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rows, r), (r, columns)))


def computed(product):
    (left, right), *_ = product.terms
    return product.compute(torch.empty(len(left), right.shape[1], dtype=torch.float64))


def in_fractions(left, right):
    columns = [[Fraction(number) for number in column] for column in right.T.tolist()]
    rows = [[Fraction(number) for number in row] for row in left.tolist()]
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in rows]


def errors(product, left, right):
    expected = in_fractions(left, right)
    return torch.tensor(
        [
            [float(abs(Fraction(number) - exact)) for number, exact in zip(row, exacts, strict=True)]
            for row, exacts in zip(product.tolist(), expected, strict=True)
        ],
        dtype=torch.float64,
    )


def scales(left, right):
    """The largest product of an element in a row and one in a column."""
    return torch.outer(left.double().abs().amax(1), right.double().abs().amax(0))


def assert_exact(product):
    for left, right in product.terms:
        result = (left @ right).tolist()
        assert [[Fraction(number) for number in row] for row in result] == in_fractions(left, right)


@pytest.mark.parametrize("r", [1, 3, 16, 64])
def test_in_fp32_the_error_is_below_that_of_a_product_in_fp32(r):
    left, right = factors(r=r)
    error = errors(computed(exact_product([(left, right)], torch.float32)), left, right)
    assert (error <= r * 2.0**-26 * scales(left, right)).all()
    assert error.norm() < errors(left @ right, left, right).norm()


@pytest.mark.parametrize("r", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_fp64_the_error_is_that_of_rounding_the_result(r, dtype):
    left, right = factors(r=r, dtype=dtype)
    error = errors(computed(exact_product([(left, right)], torch.float64)), left, right)
    assert (error <= 2.0**-51 * (left.double().abs() @ right.double().abs())).all()


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 15, 16, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_product_of_slices_is_exact_at_the_bounds(r, dtype):
    """The largest slices: all elements just below a power of two, and of one sign."""
    largest = 2 - 2.0**-23
    assert_exact(exact_product([(torch.full((2, r), largest), torch.full((r, 2), largest))], dtype))


@pytest.mark.slow
@few
@given(st.integers(1, 9), st.sampled_from(DTYPES), st.floats(0, 30), st.integers(0, 2**31))
def test_every_product_of_slices_is_exact_whatever_the_sizes_of_the_elements(r, dtype, spread, seed):
    left, right = (side * torch.exp2(spread * torch.randn_like(side)) for side in factors(3, 3, r, seed))
    assert_exact(exact_product([(left, right)], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_summation_changes_a_bit(dtype):
    for left, right in exact_product([tuple(factors(20, 30, r=50))], dtype).terms:
        whole = left @ right
        order = torch.randperm(len(right), generator=torch.Generator().manual_seed(1))
        one_by_one = sum(torch.outer(left[:, k], right[k]) for k in order)
        assert same_bits(left[:, order] @ right[order], whole)
        assert same_bits(one_by_one, whole)


def test_the_bits_are_the_same_under_any_setting():
    pair, threads = tuple(factors(300, 200, r=8)), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    expected = computed(exact_product([pair], torch.float32))
    try:
        torch.set_float32_matmul_precision("medium")
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert same_bits(computed(exact_product([pair], torch.float32)), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_has_the_bits_of_the_whole(dtype):
    product = exact_product([tuple(factors(9, 8))], dtype)
    whole = computed(product)
    assert same_bits(computed(product.part(slice(2, 5))), whole[2:5])
    assert same_bits(computed(product.part(slice(0, 9), slice(3, 4))), whole[:, 3:4].contiguous())
    assert same_bits(computed(product.part(slice(1, 7), slice(2, 8)).part(slice(1, 3))), whole[2:4, 2:8].contiguous())


def test_factors_are_added_up():
    first, second = tuple(factors(r=3)), tuple(factors(r=2, seed=5))
    joined = (torch.cat([first[0], second[0]], 1), torch.cat([first[1], second[1]]))
    total = computed(exact_product([first, second], torch.float32))
    assert same_bits(total, computed(exact_product([joined], torch.float32)))
    torch.testing.assert_close(total, joined[0].double() @ joined[1].double(), rtol=1e-7, atol=1e-7)


def test_ranks_of_very_different_sizes_are_as_precise_as_others():
    left, right = factors(r=2)
    sizes = torch.tensor([2.0**40, 2.0**-40])
    expected = left.double() @ right.double()
    result = computed(exact_product([(left * sizes, right / sizes[:, None])], torch.float32))
    torch.testing.assert_close(result, expected, rtol=0, atol=2.0**-24)


def test_zeros_give_zero():
    left, right = factors()
    assert not computed(exact_product([(left * 0, right)], torch.float32)).any()
    assert not computed(exact_product([(left, right * 0)], torch.float64)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_its_column(bad, dtype):
    left, right = factors()
    expected = left.double() @ right.double()
    left[1, 2], right[3, 4] = bad, bad
    result = computed(exact_product([(left, right)], dtype))
    assert not result[1].isfinite().any() and not result[:, 4].isfinite().any()
    rows, columns = [0, 2, 3, 4, 5, 6], [0, 1, 2, 3, 5]
    torch.testing.assert_close(result[rows][:, columns], expected[rows][:, columns], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(1e-45, 1e-45), (1e-38, 1e38), (1e38, 1e38), (0.0, 1e38), (1e-45, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_the_smallest_and_the_largest_fp32_numbers_are_exact(left, right, dtype):
    pair = tuple(factors())
    assert_exact(exact_product([(pair[0] * left, pair[1] * right)], dtype))
    single = exact_product([(torch.full((1, 1), left), torch.full((1, 1), right))], dtype)
    expected = torch.tensor(left).double() * torch.tensor(right).double()
    torch.testing.assert_close(computed(single)[0, 0], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e-110, 1e120, 1e150])
def test_products_of_fp64_numbers_of_any_size_are_exact(size):
    """Below, they may be zero; they are never partly lost, which would depend on the order."""
    assert_exact(exact_product([tuple(size * side for side in factors(dtype=torch.float64))], torch.float64))
