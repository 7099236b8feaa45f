"""Which rows of a fused map are query, key and value, told by running the code around it on row numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora
from lightning_lora.targets.fused_qkv import fused_parts
from tests.helpers import oracles

HEADS, DIM = 3, 12
SIZE = DIM // HEADS


class FusedAttention(nn.Module):
    """Self-attention over one fused map, cut by a sub-class."""

    width = 3 * DIM

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, self.width), nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(SIZE)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        batch, length, _ = x.shape
        q, k, v = self.cut(self.qkv(x), batch, length)
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return self.proj(y.transpose(1, 2).reshape(batch, length, DIM))


class Thirds(FusedAttention):
    def cut(self, y, batch, length):
        return (part.view(batch, length, HEADS, SIZE).transpose(1, 2) for part in y.chunk(3, -1))


class TheViTWay(FusedAttention):
    def cut(self, y, batch, length):
        return y.reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)


class ByHead(FusedAttention):
    def cut(self, y, batch, length):
        return y.view(batch, length, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)


class Last(FusedAttention):
    """Value first, then key, then query, the query scaled on the way and normed after."""

    def cut(self, y, batch, length):
        value = y[..., :DIM].view(batch, length, HEADS, SIZE).transpose(1, 2)
        key = y[..., DIM : 2 * DIM].view(batch, length, HEADS, SIZE).transpose(1, 2)
        query = (y[..., 2 * DIM :] * SIZE**-0.5).view(batch, length, HEADS, SIZE).transpose(1, 2)
        return self.norm(query), key, value


class Grouped(FusedAttention):
    """One key and one value for all heads."""

    width = DIM + 2 * SIZE

    def cut(self, y, batch, length):
        query, key, value = y.split([DIM, SIZE, SIZE], -1)
        return query.view(batch, length, HEADS, SIZE).transpose(1, 2), key.unsqueeze(1), value.unsqueeze(1)


class Inline(nn.Module):
    """No names at all: the function says what is what."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class KeyValue(nn.Module):
    """Query apart; the memory that is attended to is an argument."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, context=None):
        k, v = self.to_kv(x if context is None else context).chunk(2, -1)
        return self.to_out(F.scaled_dot_product_attention(self.to_q(x), k, v))


THIRDS = {"q": range(DIM), "k": range(DIM, 2 * DIM), "v": range(2 * DIM, 3 * DIM)}
BY_HEAD = {
    part: [3 * SIZE * head + SIZE * place + row for head in range(HEADS) for row in range(SIZE)]
    for place, part in enumerate("qkv")
}
CASES = {
    "thirds": (Thirds, "qkv", THIRDS),
    "vit": (TheViTWay, "qkv", THIRDS),
    "by-head": (ByHead, "qkv", BY_HEAD),
    "last": (Last, "qkv", {"q": THIRDS["v"], "k": THIRDS["k"], "v": THIRDS["q"]}),
    "grouped": (Grouped, "qkv", {"q": range(DIM), "k": range(DIM, DIM + SIZE), "v": range(DIM + SIZE, DIM + 2 * SIZE)}),
    "inline": (Inline, "qkv", THIRDS),
    "key-value": (KeyValue, "to_kv", {"k": range(DIM), "v": range(DIM, 2 * DIM)}),
}
every_case = pytest.mark.parametrize("case", CASES)


def build(case):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        owner = CASES[case][0]()
        return nn.ModuleDict({"attn": owner}), torch.randn(2, 5, DIM)


@every_case
def test_the_rows_are_those_that_the_code_cuts(case):
    model, _ = build(case)
    _, leaf, expected = CASES[case]
    parts = fused_parts(model.attn, leaf, getattr(model.attn, leaf))
    width = getattr(model.attn, leaf).out_features
    placed = {part.name: part.rows.place(torch.ones(part.rows.count(), 1), width).flatten() for part in parts}
    assert {name: rows.nonzero().flatten().tolist() for name, rows in placed.items()} == {
        name: list(rows) for name, rows in expected.items()
    }


@every_case
def test_asking_leaves_no_trace(case):
    model, _ = build(case)
    before, state = oracles.snapshot(model), torch.get_rng_state()
    apply_lora(model, LoRAConfig(r=2, targets="qv"))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.items():
        assert oracles.same_bits(model.state_dict()[name], value)


@every_case
def test_qv_is_query_and_value_apart_as_if_they_were_layers(case):
    model, x = build(case)
    plain = copy.deepcopy(model)
    _, leaf, expected = CASES[case]
    apply_lora(model, LoRAConfig(r=2, alpha=4, targets="qv"))
    oracles.train_by_hand(model)
    layer, wanted = getattr(model.attn, leaf), getattr(plain.attn, leaf)
    for name, pair in layer.lora.default.items():
        assert name in "qv"
        assert (pair.A.shape, pair.B.shape) == ((2, DIM), (len(expected[name]), 2))
        wanted.weight.data[list(expected[name])] += 2 * pair.B.detach() @ pair.A.detach()
    if case == "key-value":
        query = model.attn.to_q.lora.default
        plain.attn.to_q.weight.data += 2 * query.B.detach() @ query.A.detach()
    oracles.assert_close(model.attn(x), plain.attn(x), torch.float32)
    model.attn(x).square().sum().backward()
    assert all(matrix.grad.any() for _, matrix in lora_parameters(model))
    frozen = layer.weight.detach().clone()
    merge_lora(model)
    changed = (layer.weight != frozen).any(1).nonzero().flatten().tolist()
    assert changed == sorted(row for name in "qv" if name in expected for row in expected[name])
    oracles.assert_close(model.attn(x), plain.attn(x), torch.float32)


def test_attn_adapts_the_whole_of_it_and_names_reach_each_part():
    model, _ = build("by-head")
    apply_lora(model, LoRAConfig(r=2, targets="attn"))
    assert model.attn.qkv.lora.default.B.shape == (3 * DIM, 2)
    for name in "qkv":
        model, _ = build("by-head")
        apply_lora(model, LoRAConfig(r=2, targets=[f"qkv.{name}"], rank_pattern={f"attn.qkv.{name}": 5}))
        assert list(model.attn.qkv.lora.default) == [name]
        assert model.attn.qkv.lora.default[name].A.shape == (5, DIM)


class Mixed(FusedAttention):
    """Query and key share rows, so that no row is one of the two alone."""

    def cut(self, y, batch, length):
        q, v = y[..., : 2 * DIM].chunk(2, -1)
        return tuple(part.view(batch, length, HEADS, SIZE).transpose(1, 2) for part in (q, q, v))


class Hidden(FusedAttention):
    """What is done with the rows is not to be seen."""

    def cut(self, y, batch, length):
        return (y.exp().log().view(batch, length, HEADS, 3, SIZE).transpose(1, 2)[..., place, :] for place in range(3))


@pytest.mark.parametrize("owner", [Mixed, Hidden])
def test_what_cannot_be_told_is_refused_with_the_way_out(owner):
    model = nn.ModuleDict({"attn": owner()})
    with pytest.raises(
        ValueError, match=r"`attn.qkv` fuses query, key and value, and which .* write targets=\['qkv'\]"
    ):
        apply_lora(model, LoRAConfig(targets="qv"))
    assert apply_lora(model, LoRAConfig(targets=["qkv"])) == ["attn.qkv"]


class Caching(Thirds):
    """Keeps what it computed, and what it made for it."""

    def __init__(self):
        super().__init__()
        self.seen, self.masks = [], {}
        self.bn = nn.BatchNorm1d(DIM)

    def reset_parameters(self):
        self.qkv.weight.data.zero_()

    def cut(self, y, batch, length):
        self.bn(torch.ones(2, DIM))
        q, k, v = super().cut(y, batch, length)
        self.seen.append(k)
        self.masks[length] = torch.ones(length)
        return q, k, v


def test_nothing_of_it_stays_in_the_module():
    model = nn.ModuleDict({"attn": Caching()})
    before = oracles.snapshot(model)
    apply_lora(model, LoRAConfig(r=2, targets="qv"))
    assert model.attn.seen == [] and model.attn.masks == {}
    assert all(oracles.same_bits(model.state_dict()[name], value) for name, value in before.items())


def test_a_part_can_be_left_out_of_a_whole():
    model, _ = build("by-head")
    apply_lora(model, LoRAConfig(r=2, targets=["qkv"], exclude=["qkv.k"]))
    assert list(model.attn.qkv.lora.default) == ["q", "v"]


def test_names_that_the_function_contradicts_tell_nothing():
    class Swapped(Inline):
        def forward(self, x):
            k, q, v = self.qkv(x).chunk(3, -1)
            return self.proj(F.scaled_dot_product_attention(k, q, v))

    with pytest.raises(ValueError, match="which rows are which was not found"):
        apply_lora(nn.ModuleDict({"attn": Swapped()}), LoRAConfig(targets="qv"))
