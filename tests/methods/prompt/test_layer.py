"""Blocks that a prompt passes, against the same blocks called by hand on longer sequences."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.methods.prompt.config import PromptConfig
from lightning_lora.methods.prompt.method import PromptMethod
from tests.helpers.models import GroupedAttention

LENGTH, TOKENS, BATCH, D = 3, 5, 2, 16
X = torch.randn(BATCH, TOKENS, D, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)


class Layer(nn.Module):
    """A block before whose attention nothing is known of positions."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.attn = GroupedAttention(D)
        self.attn.is_causal = causal
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, str]:
        x = x + self.attn(x, None, attention_mask, self.attn.is_causal and attention_mask is None)
        return x + self.mlp(x), "more"


class Stack(nn.Module):
    def __init__(self, layers: int = 3, causal: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(causal) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, use_reentrant: bool | None = None) -> Tensor:
        for layer in self.layers:
            if use_reentrant is None:
                x, _ = layer(x, attention_mask=mask)
            else:
                x, _ = checkpoint(layer, x, mask, use_reentrant=use_reentrant)
        return x


def build(deep: bool = False, **arguments: object) -> Stack:
    torch.manual_seed(0)
    return adapted(Stack(**arguments), deep)


def adapted(model: nn.Module, deep: bool) -> nn.Module:
    PromptMethod(PromptConfig(length=LENGTH, deep=deep, seed=1)).complete(model)
    with torch.no_grad():
        for vectors in vectors_of(model):
            vectors *= 40
    return model


def vectors_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".prompt.vectors")]


def by_hand(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The plain blocks on longer sequences; ``mask`` is additive and covers them."""
    plain = copy.deepcopy(model)
    vectors = [v.expand(len(x), -1, -1) for v in vectors_of(model)]
    PromptMethod(PromptConfig(length=LENGTH)).drop(plain)
    if len(vectors) == 1:
        return plain(torch.cat([*vectors, x], 1), mask)[:, LENGTH:]
    for prompt, layer in zip(vectors, plain.layers, strict=True):
        x = layer(torch.cat([prompt, x], 1), mask)[0][:, LENGTH:]
    return x


def longer(shown: Tensor) -> Tensor:
    """An additive mask of ``(batch, 1, length, length)`` from what tokens are shown; the prompt is always."""
    mask = torch.zeros(*shown.shape[:-2], LENGTH + TOKENS, LENGTH + TOKENS)
    mask[..., LENGTH:, LENGTH:] = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
    return mask


PADDING = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
PADDING[0, ..., :2] = False
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def causal_rows(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[..., :LENGTH, :] = torch.full((LENGTH, LENGTH + TOKENS), -torch.inf).triu(1)
    return mask


def padded_rows() -> Tensor:
    mask = longer(PADDING.expand(-1, -1, TOKENS, -1))
    mask[..., :LENGTH, LENGTH:] = mask[..., LENGTH:, LENGTH:][..., :1, :]
    return mask


CASES = {
    "no mask": (False, None, torch.zeros(1, 1, 1, 1).expand(BATCH, 1, 8, 8)),
    "padding of keys": (False, PADDING, padded_rows()),
    "padding of keys, additive": (False, torch.zeros(PADDING.shape).masked_fill(~PADDING, -1e30), padded_rows()),
    "padding of queries and keys": (False, PADDING.expand(-1, -1, TOKENS, -1), padded_rows()),
    "causal, by the kernel": (True, None, causal_rows(longer(CAUSAL.expand(BATCH, 1, -1, -1)))),
    "causal mask": (True, CAUSAL.expand(BATCH, 1, -1, -1), causal_rows(longer(CAUSAL.expand(BATCH, 1, -1, -1)))),
    "causal mask, additive": (
        True,
        HIDDEN.expand(BATCH, 1, -1, -1),
        causal_rows(longer(CAUSAL.expand(BATCH, 1, -1, -1))),
    ),
}


@pytest.mark.parametrize("deep", [False, True], ids=["first block", "every block"])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_plain_blocks_on_longer_sequences(case, deep):
    causal, mask, whole = CASES[case]
    model = build(deep, causal=causal)
    output, expected = model(X, mask), by_hand(model, X, whole)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert output.shape == X.shape
    weight = torch.randn(output.shape)
    actual = torch.autograd.grad((output * weight).sum(), vectors_of(model))
    oracle = torch.autograd.grad((expected * weight).sum(), vectors_of(model))
    for found, right in zip(actual, oracle, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_no_token_learns_of_a_later_one(deep, masked):
    model = build(deep, causal=True)
    mask = CAUSAL.expand(BATCH, 1, -1, -1) if masked else None
    changed = X.clone()
    changed[:, 3] += 1
    before, after = model(X, mask), model(changed, mask)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("mask", [CAUSAL, HIDDEN], ids=["boolean", "additive"])
def test_a_mask_alone_keeps_tokens_from_learning_through_the_prompt(mask):
    """Nothing says that the blocks are causal but the mask."""
    model = build(causal=False)
    mask, changed = mask.expand(BATCH, 1, -1, -1), X.clone()
    changed[:, 3] += 1
    assert torch.equal(model(X, mask)[:, :3], model(changed, mask)[:, :3])


def test_the_prompt_moves_every_token():
    model = build(causal=True)
    before = model(X)
    vectors_of(model)[0].data[-1] += 1
    assert (model(X) != before).any(-1).all()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(deep, use_reentrant):
    model = build(deep, causal=True)
    gradients = []
    for checkpointing in (None, use_reentrant):
        output = model(X.clone().requires_grad_(), None, checkpointing)
        gradients.append(
            torch.autograd.grad(output.square().sum(), vectors_of(model))
            if checkpointing is not True
            else backward(model, output)
        )
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def backward(model: nn.Module, output: Tensor) -> list[Tensor]:
    output.square().sum().backward()  # a reentrant checkpoint knows no torch.autograd.grad
    return [vectors.grad for vectors in vectors_of(model)]


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_one_graph_when_compiled(deep):
    model = build(deep, causal=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = CAUSAL.expand(BATCH, 1, -1, -1)
    torch.testing.assert_close(compiled(X, mask), model(X, mask))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal, boolean"])
def test_an_encoder_of_torch(batch_first, deep, masks):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 4, 32, dropout=0, batch_first=batch_first)
    model = adapted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first), deep)
    vectors = [v.expand(BATCH, -1, -1) for v in vectors_of(model)]
    plain = copy.deepcopy(model)
    PromptMethod(PromptConfig(length=LENGTH)).drop(plain)
    swap = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, 3:] = True
    given, meant = {}, {}
    if masks == "padding":
        given, meant = {"src_key_padding_mask": padding}, {"src_key_padding_mask": nn.functional.pad(padding, (3, 0))}
    elif masks != "none":
        given = {"mask": HIDDEN if masks == "causal" else ~CAUSAL}
        meant = {"src_mask": causal_rows(longer(CAUSAL))}  # torch itself says to the layers that it is causal
    x = X
    if deep:
        for prompt, block in zip(vectors, plain.layers, strict=True):
            x = swap(block(swap(torch.cat([prompt, x], 1)), **meant))[:, LENGTH:]
    else:
        x = torch.cat([*vectors, x], 1)
        for block in plain.layers:
            x = swap(block(swap(x), **meant))
        x = x[:, LENGTH:]
    shown = ~padding if masks == "padding" else torch.ones_like(padding)
    for mode in (True, False):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            output = swap(model(swap(X), **given))
        torch.testing.assert_close(output[shown], x[shown], rtol=1e-5, atol=1e-5)


def test_a_decoder_layer_of_torch_with_masks_of_both_sequences():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, 32, dropout=0, batch_first=True), 2)
    model = adapted(model, False)
    plain = copy.deepcopy(model)
    PromptMethod(PromptConfig(length=LENGTH)).drop(plain)
    memory, seen = torch.randn(BATCH, 4, D), torch.zeros(TOKENS, 4)
    seen[:, 0] = -torch.inf
    output = model(X, memory, tgt_mask=HIDDEN, memory_mask=seen, tgt_is_causal=True)
    x = torch.cat([vectors_of(model)[0].expand(BATCH, -1, -1), X], 1)
    mask, seen = causal_rows(longer(CAUSAL)), seen[:1].expand(LENGTH + TOKENS, -1)
    expected = plain(x, memory, tgt_mask=mask, memory_mask=seen)[:, LENGTH:]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_double_use_sums_the_gradients():
    model = build(deep=True)
    (model(X).sum() + model(2 * X).sum()).backward()
    parts = [torch.autograd.grad(model(x).sum(), vectors_of(model)) for x in (X, 2 * X)]
    for parameter, one, other in zip(vectors_of(model), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, one + other)


@pytest.mark.parametrize("deep", [False, True])
def test_copies_and_pickles_give_the_same_output(deep):
    model = build(deep)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))


def test_lowered_models_keep_the_prompt_in_fp32():
    model = build()
    expected = model(X)
    model.to(torch.bfloat16)
    output = model(X.bfloat16())
    assert output.dtype == torch.bfloat16 and {v.dtype for v in vectors_of(model)} == {torch.float32}
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.2)


def test_first_values():
    models = [nn.ModuleList([nn.TransformerEncoderLayer(64, 2, 8)]) for _ in range(2)]
    for model in models:
        PromptMethod(PromptConfig(length=200, seed=3)).complete(model)
    (first,), (again,) = map(vectors_of, models)
    assert torch.equal(first, again) and abs(first.std() - 0.02) < 1e-3 and abs(first.mean()) < 1e-3


class Wrong(Layer):
    """Its answer is set by the test."""

    answer = None

    def forward(self, x, table=None):
        return super().forward(x)[0] if self.answer is None else self.answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda block: block(X[0]), r"must get a sequence of shape .* got a tensor of shape \(5, 16\)"),
        (lambda block: block(X[..., :4]), r"prompt of 16 features, but its input has shape \(2, 5, 4\)"),
        (lambda block: block(X, table=torch.ones(1, TOKENS, 3)), "gets `table`, which depends on the 5 tokens"),
        (lambda block: block(X, [torch.ones(1, TOKENS)]), "gets `table`, which depends on the 5 tokens"),
        (lambda block: block(), "must get its input by name or position, but got 0 arguments"),
        (lambda block: block("text"), "must get a sequence of shape .* but got <class 'str'>"),
    ],
)
def test_input_that_cannot_take_a_prompt(call, message):
    model = adapted(nn.ModuleList([Wrong()]), True)
    with pytest.raises(RuntimeError, match=rf"`0` {message}|`0` has a {message}"):
        call(model[0])


def test_output_that_is_no_sequence():
    model = adapted(nn.ModuleList([Wrong()]), True)
    model[0].answer = X[:, 0]
    with pytest.raises(RuntimeError, match=r"output of `0` must be a sequence of length 8.* has shape \(2, 16\)"):
        model[0](X)


def test_a_table_that_is_too_small():
    block = Layer()
    block.attn.register_buffer("mask", torch.ones(1, 1, 7, 7))
    model = adapted(nn.ModuleList([block]), True)
    with pytest.raises(RuntimeError, match="a table for sequences of at most 7, but 5 tokens and a prompt of 3 came"):
        model[0](X)
    assert model[0](X[:, :4])[0].shape == (BATCH, 4, D)  # the remedy


def test_print():
    assert "(prompt): Prompt(length=3, features=16)" in str(build())
