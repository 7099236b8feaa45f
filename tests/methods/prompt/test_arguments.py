"""How the other arguments of a block become longer, by hand."""

import pytest
import torch

from lightning_lora.methods.prompt.arguments import Sizes, extended

SIZES = Sizes("layers.0", "layers", tokens=3, length=2, causal=False, visible=True)
CAUSAL = Sizes("layers.0", "layers", tokens=3, length=2, causal=True, visible=True)
T, F = True, False


def test_masks_of_keys():
    assert extended("attention_mask", torch.tensor([[1, 0, 1]]), SIZES).tolist() == [[1, 1, 1, 0, 1]]
    assert extended("mask", torch.tensor([[T, F, T]]), SIZES).tolist() == [[T, T, T, F, T]]
    hidden = Sizes("layers.0", "layers", tokens=3, length=2, causal=False, visible=False)
    assert extended("src_key_padding_mask", torch.tensor([[T, F, T]]), hidden).tolist() == [[F, F, T, F, T]]
    added = extended("attention_mask", torch.tensor([[[[0.0, -1.0, 0.0]]]]), SIZES)
    assert added.tolist() == [[[[0, 0, 0, -1, 0]]]]


def test_masks_of_queries_and_keys():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert extended("attention_mask", mask, SIZES)[0, 0].tolist() == [
        [T, T, T, F, F],  # the prompt sees those that every token sees
        [T, T, T, F, F],
        [T, T, T, F, F],
        [T, T, T, T, F],
        [T, T, T, T, T],
    ]
    assert extended("attention_mask", mask, CAUSAL)[0, 0].tolist()[:2] == [[T, F, F, F, F], [T, T, F, F, F]]
    lowest = torch.finfo(torch.float32).min
    added = extended("attention_mask", torch.zeros(1, 1, 3, 3), CAUSAL)[0, 0]
    assert added.tolist()[:2] == [[0, *[lowest] * 4], [0, 0, *[lowest] * 3]] and not added[2:].any()


def test_a_mask_of_another_sequence_gets_more_queries_and_no_more_keys():
    mask = torch.tensor([[[[T, F], [T, T], [T, T]]]])
    rows = extended("encoder_attention_mask", mask, CAUSAL)
    assert rows[0, 0].tolist() == [[T, F], [T, F], [T, F], [T, T], [T, T]]
    assert extended("encoder_attention_mask", mask[..., :1, :], CAUSAL).shape == (1, 1, 1, 2)
    states = torch.ones(1, 3, 4)
    assert extended("encoder_hidden_states", states, CAUSAL) is states


def test_positions_and_rotations():
    assert extended("position_ids", torch.tensor([[0, 1, 2]]), SIZES).tolist() == [[0, 0, 0, 1, 2]]
    cosine, sine = torch.rand(1, 3, 4), torch.rand(1, 3, 4)
    longer = extended("position_embeddings", (cosine, sine), SIZES)
    assert torch.equal(longer[0], torch.cat([torch.ones(1, 2, 4), cosine], 1))
    assert torch.equal(longer[1], torch.cat([torch.zeros(1, 2, 4), sine], 1))
    turns = torch.polar(torch.ones(1, 3, 2), torch.rand(1, 3, 2))
    assert torch.equal(extended("position_embeddings", turns, SIZES), torch.cat([torch.ones(1, 2, 2), turns], 1))


def test_what_does_not_depend_on_the_tokens_stays():
    for value in (None, 3, "text", torch.ones(3, 4), torch.ones(2), [torch.ones(2, 5)], object()):
        assert extended("other", value, SIZES) is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi", torch.ones(2, 1, 3)),
        ("rope", torch.ones(2, 4)),  # of all tokens but the first
        ("cache_position", torch.arange(3)),
        ("cu_seqlens", torch.tensor([0, 2, 3, 9])),
        ("attention_mask", {"of": "flex_attention"}),
        ("tables", [torch.ones(1, 3)]),
        ("query_length", 3),
        ("attention_mask", torch.ones(1, 1, 3, 1)),
        ("attention_mask", torch.ones(1, 3)),  # of floats: factors, or added?
        ("mask", torch.ones(3, 3, dtype=torch.bool)),  # of queries and keys, or of a batch of 3?
        ("position_embeddings", torch.ones(1, 3, 4)),
        ("position_embeddings", (torch.ones(1, 2, 4), torch.ones(1, 2, 4))),
    ],
)
def test_what_is_not_known_is_an_error(name, value):
    with pytest.raises(RuntimeError) as caught:
        extended(name, value, SIZES)
    assert str(caught.value) == (
        f"`layers.0` gets `{name}`, which depends on the 3 tokens, and what the prompt would get is not known. If the "
        "model has other blocks, leave these out: exclude=['layers']. In a block of your own, name a mask of attention "
        "`attn_mask`, and one of padding `padding_mask`."
    )


def test_a_boolean_mask_of_which_nobody_knows_what_true_means():
    unknown = Sizes("layers.0", "layers", tokens=3, length=2, causal=False, visible=None)
    with pytest.raises(RuntimeError, match=r"`layers.0` gets `attention_mask`, which depends on the 3 tokens"):
        extended("attention_mask", torch.ones(1, 1, 3, 3, dtype=torch.bool), unknown)
    with pytest.raises(RuntimeError, match=r"`layers.0` gets `encoder_attention_mask`, which depends on the 3 tokens"):
        extended("encoder_attention_mask", torch.ones(1, 1, 3, 2, dtype=torch.bool), unknown)
