"""The fusion of bottlenecks against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora.methods.fusion.layer import FrozenBottleneck, Fusion


def bottlenecks(count, features=6, **arguments):
    generator = torch.Generator().manual_seed(count)
    made = {}
    for name in "abc"[:count]:
        bottleneck = FrozenBottleneck(features, 3, site="layer", **arguments)
        for parameter in bottleneck.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        made[name] = bottleneck.freeze()
    return made


def random_fusion(count=3, **arguments):
    fusion = Fusion(bottlenecks(count, **arguments))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return fusion


def formula(fusion, y, x):
    """Written out for one position, in fp64."""
    p = {name: value.double() for name, value in fusion.named_parameters()}
    updates = [adapter.update(x) for adapter in fusion.adapters.values()]
    query = p["query"] @ y + p["query_bias"]
    scores = torch.stack([query @ (p["key"] @ update + p["key_bias"]) for update in updates])
    shares = scores.exp() / scores.exp().sum()
    return y + p["value"] @ sum(share * update for share, update in zip(shares, updates, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"norm": True, "scale": 4.0}])
def test_formula(arguments):
    fusion = random_fusion(**arguments)
    y, x = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = zip(y.view(-1, 6), x.view(-1, 6), strict=True)
    torch.testing.assert_close(fusion(y, x), torch.stack([formula(fusion, *row) for row in rows]).view(y.shape))
    torch.testing.assert_close(fusion(y), fusion(y, y))


def test_channels():
    fusion, y = random_fusion(channel_dim=-2), torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fusion(y)[1, :, 2], formula(fusion, y[1, :, 2], y[1, :, 2]))


def test_one_bottleneck_starts_as_itself_bit_for_bit():
    adapters, y = bottlenecks(1), torch.randn(4, 6)
    assert torch.equal(Fusion(adapters)(y), adapters["a"](y))


def test_initial_values():
    fusion = Fusion(bottlenecks(2, features=60), init_std=0.5, seed=1)
    assert torch.equal(fusion.value, torch.eye(60))
    assert not fusion.query_bias.any()
    assert not fusion.key_bias.any()
    assert all(0.45 < matrix.std() < 0.55 for matrix in (fusion.query, fusion.key))
    assert not torch.equal(fusion.query, fusion.key)
    assert torch.equal(fusion.query, Fusion(bottlenecks(2, features=60), init_std=0.5, seed=1).query)


def test_bottlenecks_are_frozen_and_in_the_state():
    fusion = random_fusion(2)
    assert [name for name, _ in fusion.named_parameters()] == ["query", "key", "value", "query_bias", "key_bias"]
    kept = [f"adapters.{name}.{key}" for name in "ab" for key in ("down", "down_bias", "up", "up_bias")]
    assert [name for name, _ in fusion.named_buffers()] == kept
    assert set(kept) < fusion.state_dict().keys()
    fusion(torch.randn(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in fusion.parameters())


def test_values_stay_fp32():
    fusion = random_fusion(2)
    before = copy.deepcopy(fusion.state_dict())
    y = nn.Sequential(nn.Linear(6, 6), fusion).bfloat16()(torch.randn(2, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in fusion.state_dict().items())


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert random_fusion(2)(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
