"""Bits, not values: -0 is not 0, a NaN equals itself, and a checksum misses no single change."""

import math
import struct

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora import bits as module
from lightning_lora.bits import bits, checksum, same_bits

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
few = settings(deadline=None, max_examples=60)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def written_out(tensor):
    """The checksum as its definition says, in Python's integers: words of 8 bytes, each times an odd factor."""
    raw = b"".join(struct.pack("<B", byte) for byte in tensor.contiguous().view(-1).view(torch.uint8).tolist())
    raw += bytes(-len(raw) % 8)
    words = struct.unpack(f"<{len(raw) // 8}q", raw)
    total = sum(word * (2 * place + 1) * -7046029254386353131 for place, word in enumerate(words))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_integers_of_the_same_width(dtype):
    tensor = torch.tensor([0.0, -0.0, 1.0], dtype=dtype)
    seen = bits(tensor)
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


@few
@given(shapes, st.sampled_from([*FLOATS, torch.uint8, torch.int64, torch.bool]), st.integers(0, 2**31))
def test_checksum_is_the_sum_as_written_out(shape, dtype, seed):
    tensor = oracles.any_bits(shape, dtype, seed) if dtype != torch.bool else torch.ones(shape, dtype=dtype)
    assert checksum(tensor) == written_out(tensor)
    assert checksum(tensor) == checksum(tensor.clone())


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


def test_checksum_of_many_blocks_is_that_of_one(monkeypatch):
    tensor = oracles.any_bits((1000,), torch.float32)
    whole = checksum(tensor)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert checksum(tensor) == whole == written_out(tensor)


def test_a_parameter_has_the_checksum_of_its_values():
    parameter = torch.nn.Parameter(torch.randn(3, 3))
    assert checksum(parameter) == checksum(parameter.detach().clone())
    assert same_bits(parameter, parameter.detach().clone())
