"""``nn.MultiheadAttention`` with a prefix, against the formula in fp64 and against torch's own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.method import PrefixMethod

LENGTH, TOKENS, SOURCES, BATCH, D, HEADS = 3, 5, 6, 2, 8, 2
X = torch.randn(BATCH, TOKENS, D, generator=torch.Generator().manual_seed(0))
STATES = torch.randn(BATCH, SOURCES, D, generator=torch.Generator().manual_seed(1))


def adapted(**arguments: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(D, HEADS, **{"batch_first": True, **arguments})
    nn.init.normal_(layer.in_proj_bias)
    PrefixMethod(PrefixConfig(length=LENGTH, seed=1)).complete(nn.ModuleList([layer]))
    with torch.no_grad():
        for parameter in layer.prefix.parameters():
            parameter *= 40
    return layer


def written_out(layer, x, states, mask=None):
    """The output, and the weights of the tokens of every head. ``mask`` is additive: ``(batch, heads, x, states)``."""
    W, b = (layer.in_proj_weight.double().chunk(3), layer.in_proj_bias.double().chunk(3))
    q, k, v = (y.double() @ w.T + c for y, w, c in zip((x, states, states), W, b, strict=True))
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
    K, V = (p.double().expand(len(x), -1, -1, -1) for p in (layer.prefix.K, layer.prefix.V))
    scores = q @ torch.cat([K, k], 2).mT / (D / HEADS) ** 0.5
    if mask is not None:
        scores[..., LENGTH:] += mask
    weights = scores.softmax(-1)
    output = (weights @ torch.cat([V, v], 2)).transpose(1, 2).flatten(2)
    return output @ layer.out_proj.weight.double().T + layer.out_proj.bias.double(), weights[..., LENGTH:]


HIDDEN = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
HIDDEN[0, 4:] = True
ADDED = torch.zeros(BATCH, 1, 1, SOURCES).masked_fill(HIDDEN[:, None, None], -torch.inf)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
MASKS = {
    "none": ({}, None),
    "padding, boolean": ({"key_padding_mask": HIDDEN}, ADDED),
    "padding, additive": ({"key_padding_mask": ADDED[:, 0, 0]}, ADDED),
    "mask, boolean": ({"attn_mask": HIDDEN[0].expand(TOKENS, -1)}, ADDED[:1].expand(BATCH, -1, -1, -1)),
    "mask of every head": ({"attn_mask": torch.ones(BATCH * HEADS, TOKENS, SOURCES)}, torch.ones(1)),
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_it_is_attention_over_the_prefix_and_the_tokens(masks, need_weights):
    layer = adapted()
    given, mask = MASKS[masks]
    output, weights = layer(X, STATES, STATES, need_weights=need_weights, average_attn_weights=False, **given)
    expected, right_weights = written_out(layer, X, STATES, mask)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(weights.double(), right_weights, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(output.square().sum(), list(layer.prefix.parameters()))
    oracle = torch.autograd.grad(expected.square().sum(), list(layer.prefix.parameters()))
    for found, right in zip(actual, oracle, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_causal(need_weights):
    layer = adapted()
    output, _ = layer(X, X, X, attn_mask=CAUSAL, is_causal=True, need_weights=need_weights)
    expected, _ = written_out(layer, X, X, CAUSAL.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"batch_first": False}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}], ids=str)
def test_the_weights_of_the_tokens_keep_their_proportions(arguments):
    layer = adapted(**arguments)
    plain = copy.deepcopy(layer)
    del plain.prefix
    plain.__class__ = nn.MultiheadAttention
    x, k, v = X, torch.randn(BATCH, SOURCES, layer.kdim), torch.randn(BATCH, SOURCES, layer.vdim)
    if not layer.batch_first:
        x, k, v = (y.transpose(0, 1) for y in (x, k, v))
    output, weights = layer(x, k, v, average_attn_weights=False)
    _, right = plain(x, k, v, average_attn_weights=False)
    share = weights.sum(-1, keepdim=True)
    torch.testing.assert_close(weights / share, right)
    assert (share < 1).all() and output.shape == x.shape


def test_one_sequence_without_a_batch():
    layer = adapted()
    output, weights = layer(X[0], STATES[0], STATES[0])
    batched, right = layer(X[:1], STATES[:1], STATES[:1])
    assert torch.equal(output, batched[0]) and torch.equal(weights, right[0])


@pytest.mark.slow
def test_one_graph_when_compiled():
    layer = adapted()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, X, X)[0], layer(X, X, X)[0])


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_sub_class_with_a_forward_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"`0` computes attention without `F.scaled_dot_product_attention`"):
        PrefixMethod(PrefixConfig()).complete(nn.ModuleList([Own(D, HEADS)]))


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_torch_takes_no_fast_path(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    PrefixMethod(PrefixConfig(length=LENGTH)).complete(encoder)
    padding = HIDDEN if padded else None
    tokens = ~HIDDEN if padded else torch.ones_like(HIDDEN)
    with_gradients = encoder(STATES, src_key_padding_mask=padding)[tokens]
    with torch.no_grad():
        torch.testing.assert_close(encoder(STATES, src_key_padding_mask=padding)[tokens], with_gradients)
    with_gradients.square().sum().backward()
    assert all(layer.self_attn.prefix.K.grad.any() for layer in encoder.layers)
    PrefixMethod(PrefixConfig()).remove(encoder)
    assert {type(module).__name__ for module in encoder.modules()} == {type(m).__name__ for m in layer.modules()} | {
        *("TransformerEncoder", "ModuleList")
    }
