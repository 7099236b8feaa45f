"""Random numbers by their places: good enough to be independent, and the same everywhere."""

from __future__ import annotations

import torch

from lightning_lora.layers.adapter import seed_of
from lightning_lora.methods.subspace.random_numbers import normals, permutation, random_bits, signs


def places(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def written_out(seed: int, place: int) -> int:
    """The same hash in numbers of Python."""
    mask = 2**32 - 1
    bits = (place * (seed >> 32 | 1) + seed) & mask
    bits ^= bits >> 16
    bits = bits * 0x7FEB352D & mask
    bits ^= bits >> 15
    bits = bits * 0x846CA68B & mask
    return bits ^ (bits >> 16)


def test_bits_are_those_of_the_hash_written_out():
    seed = 0x0123456789ABCDEF
    bits = random_bits(seed, places(1000)).tolist()
    assert [value & (2**32 - 1) for value in bits] == [written_out(seed, place) for place in range(1000)]


def test_no_two_places_have_the_same_bits():
    assert len(random_bits(5, places(100_000)).unique()) == 100_000


def test_another_seed_changes_half_of_the_bits():
    base = random_bits(seed_of(0, "0", "P"), places(4096))
    for name in map(str, range(1, 40)):
        changed = base ^ random_bits(seed_of(0, name, "P"), places(4096))
        share = sum((changed >> place & 1).float().mean().item() for place in range(32)) / 32
        assert abs(share - 0.5) < 0.01, name


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    x = normals(random_bits(seed_of(0, "0", "P"), places(2**18)))
    moments = [(x**power).mean().item() for power in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.tensor(moments), torch.tensor([0.0, 1, 0, 3]), atol=0.03, rtol=0)
    assert abs((x[1:] * x[:-1]).mean()) < 0.01


def test_numbers_of_two_seeds_are_uncorrelated():
    seed = seed_of(0, "0", "P")
    for other in (seed_of(0, "1", "P"), seed_of(1, "0", "P"), ~seed):
        x, y = (normals(random_bits(each, places(2**16))) for each in (seed, other))
        assert abs((x * y).mean()) < 0.02


def test_signs_are_even():
    x = signs(random_bits(3, places(2**16)))
    assert x.unique().tolist() == [-1, 1] and abs(x.float().mean()) < 0.02


def test_a_permutation_holds_every_place_once():
    order = permutation(7, 64, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(64)) and order.tolist() != list(range(64))
