"""Bits, not values: -0 is not 0, a NaN equals itself, and a checksum misses no single change."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.ops import exact_sum as module
from lightning_lora.ops.exact_sum import as_integers, checksum, quick_checksum, same_bits
from lightning_lora.ops.workspace import Workspace
from tests.helpers import oracles

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
few = settings(deadline=None, max_examples=60)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_integers_of_the_same_width(dtype):
    tensor = torch.tensor([0.0, -0.0, 1.0], dtype=dtype)
    seen = as_integers(tensor)
    assert (seen.dtype, seen.shape) == (oracles.INTEGERS[dtype.itemsize], tensor.shape)
    assert seen[0] == 0
    assert seen[1] == torch.iinfo(seen.dtype).min  # the sign bit alone


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_differs_and_nan_equals_itself(dtype):
    zero, nan = torch.zeros(2, dtype=dtype), torch.full((2,), math.nan, dtype=dtype)
    payload = nan.clone().view(oracles.INTEGERS[dtype.itemsize]) + 1
    assert not same_bits(zero, -zero)
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, payload.view(dtype))


def test_shape_and_dtype_belong_to_the_bits():
    zeros = torch.zeros(2, 3)
    assert not same_bits(zeros, torch.zeros(3, 2))
    assert not same_bits(zeros, torch.zeros(2, 3, dtype=torch.int32))
    assert not same_bits(zeros.half(), zeros.bfloat16())


def test_strides_do_not_matter():
    tensor = torch.randn(4, 6)
    turned = tensor.t().contiguous().t()
    assert turned.stride() != tensor.stride()
    assert same_bits(tensor, turned)
    assert checksum(tensor) == checksum(turned)
    assert same_bits(tensor[:, ::2], tensor[:, ::2].clone())
    assert checksum(tensor[:, ::2]) == checksum(tensor[:, ::2].clone())


@pytest.mark.slow
@few
@given(shapes, st.sampled_from([*FLOATS, torch.uint8, torch.int64]), st.integers(0, 2**31))
def test_checksum_is_of_the_bits_in_their_order_alone(shape, dtype, seed):
    tensor = oracles.any_bits(shape, dtype, seed)
    total = checksum(tensor)
    assert -(2**63) <= total < 2**63
    assert total == checksum(tensor.clone()) == checksum(tensor.flatten())
    assert total == checksum(tensor.flatten().view(torch.uint8))


@pytest.mark.slow
@few
@given(st.integers(1, 40), st.sampled_from(FLOATS), st.integers(0, 2**31), st.data())
def test_any_changed_bit_changes_the_checksum(count, dtype, seed, data):
    tensor = oracles.any_bits((count,), dtype, seed)
    place = data.draw(st.integers(0, tensor.nbytes - 1))
    bit = data.draw(st.integers(0, 7))
    changed = tensor.clone()
    changed.view(torch.uint8)[place] ^= 1 << bit
    assert checksum(changed) != checksum(tensor)
    assert not same_bits(changed, tensor)


def test_elements_that_change_places_change_the_checksum():
    tensor = torch.arange(1, 7, dtype=torch.float64)
    assert checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(torch.cat([tensor, torch.ones(1)])) != checksum(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 5, 16, 19])
def test_any_two_elements_that_change_places_change_the_checksum(monkeypatch, count):
    monkeypatch.setattr(module, "BLOCK", 4)
    tensor = torch.arange(1, count + 1) ** 3
    unseen = []
    for one, other in combinations(range(count), 2):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        if checksum(swapped) == checksum(tensor):
            unseen.append((one, other))
    assert unseen == []


@pytest.mark.parametrize("place", [0, 3, 4, 7, 8, 9])
def test_a_change_in_any_block_changes_the_checksum(monkeypatch, place):
    monkeypatch.setattr(module, "BLOCK", 4)
    tensor = oracles.any_bits((10,), torch.float64)
    changed = tensor.clone()
    changed.view(torch.int64)[place] ^= 1
    assert checksum(changed) != checksum(tensor)


def test_a_parameter_has_the_checksum_of_its_values():
    parameter = torch.nn.Parameter(torch.randn(3, 3))
    assert checksum(parameter) == checksum(parameter.detach().clone())
    assert same_bits(parameter, parameter.detach().clone())


def quick(tensor):
    return quick_checksum(tensor, Workspace())


@pytest.mark.slow
@few
@given(shapes, st.sampled_from([*FLOATS, torch.uint8, torch.int64]), st.integers(0, 2**31), st.integers(1, 3))
def test_the_quick_checksum_is_of_the_bits_in_their_order_alone(shape, dtype, seed, threads):
    tensor, before = oracles.any_bits(shape, dtype, seed), torch.get_num_threads()
    total = quick(tensor)
    torch.set_num_threads(threads)
    assert total == quick(tensor.clone()) == quick(tensor.flatten()) == quick(tensor.flatten().view(torch.uint8))
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [3, 4, 7, 8, 11, 40])
def test_the_quick_checksum_sees_any_changed_bit(monkeypatch, count):
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "ON_CPU", 8)
    tensor = oracles.any_bits((count,), torch.float64)
    seen = {quick(tensor)}
    for place in range(count):
        for bit in (0, 31, 63):
            changed = tensor.clone()
            changed.view(torch.int64)[place] ^= 1 << bit if bit < 63 else -(1 << 63)
            seen.add(quick(changed))
    assert len(seen) == 1 + 3 * count


@pytest.mark.parametrize("count", [5, 16, 19])
def test_the_quick_checksum_sees_any_two_elements_that_change_places(monkeypatch, count):
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "ON_CPU", 8)
    tensor = torch.arange(1, count + 1) ** 3
    for one, other in combinations(range(count), 2):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        assert quick(swapped) != quick(tensor)


def test_the_quick_checksum_sees_rows_and_columns_that_change_places():
    tensor = torch.randn(2048, 2048)
    changes = [tensor.flip(0), tensor.flip(1), tensor.t().contiguous(), tensor.roll(1, 0), tensor.roll(1, 1)]
    assert len({quick(each) for each in (tensor, *changes)}) == 6
    assert quick(tensor.t()) == quick(tensor.t().contiguous())
