"""A block with a prefix, against attention written out in fp64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.methods.prefix.config import PrefixConfig
from lightning_lora.methods.prefix.layer import mask_with_prefix
from lightning_lora.methods.prefix.method import PrefixMethod
from tests.helpers.models import GroupedAttention

LENGTH, TOKENS, BATCH = 3, 5, 2


def adapted(block: nn.Module, length: int = LENGTH) -> nn.Module:
    """``block`` in a model, with a prefix that is large enough to matter."""
    model = nn.ModuleDict({"attn": block})
    PrefixMethod(PrefixConfig(length=length, seed=1)).complete(model)
    with torch.no_grad():
        for parameter in block.prefix.parameters():
            parameter *= 40
    return block


def grouped(**arguments: object) -> GroupedAttention:
    torch.manual_seed(0)
    return adapted(GroupedAttention(**arguments))


def written_out(block, x, states=None, mask=None):
    """Softmax over the prefix and the tokens, head by head. ``mask`` is additive, over the tokens."""
    x, states = x.double(), (x if states is None else states).double()
    project = lambda layer, y: F.linear(y, layer.weight.double(), layer.bias.double())  # noqa: E731
    q, k, v = project(block.q_proj, x), project(block.k_proj, states), project(block.v_proj, states)
    d, heads = q.shape[-1] // 4, []
    for head in range(4):
        group = head // 2
        K, V = (p[group].double().expand(len(x), -1, -1) for p in (block.prefix.K, block.prefix.V))
        keys = torch.cat([K, k[..., group * d : (group + 1) * d]], 1)
        values = torch.cat([V, v[..., group * d : (group + 1) * d]], 1)
        scores = q[..., head * d : (head + 1) * d] @ keys.mT / d**0.5
        if mask is not None:
            scores[..., LENGTH:] += mask[:, head] if mask.shape[1] > 1 else mask[:, 0]
        heads.append(scores.softmax(-1) @ values)
    return project(block.o_proj, torch.cat(heads, -1))


X, STATES = (torch.randn(BATCH, n, 16, generator=torch.Generator().manual_seed(n)) for n in (TOKENS, 7))
CAUSAL = torch.full((TOKENS, TOKENS), -torch.inf).triu(1).expand(BATCH, 1, -1, -1)
PADDING = torch.zeros(BATCH, 1, 1, TOKENS)
PADDING[0, ..., 3:] = -torch.inf
BIAS = torch.randn(BATCH, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(9))
CASES = {
    "no mask": ({}, {}),
    "is_causal": ({"causal": True}, {"mask": CAUSAL}),
    "padding, boolean": ({"mask": PADDING == 0}, {"mask": PADDING}),
    "padding, additive": ({"mask": PADDING}, {"mask": PADDING}),
    "causal and padding": ({"mask": CAUSAL + PADDING}, {"mask": CAUSAL + PADDING}),
    "a bias of every head": ({"mask": BIAS}, {"mask": BIAS}),
    "one mask for all keys": ({"mask": torch.ones(BATCH, 1, TOKENS, 1, dtype=torch.bool)}, {}),
    "two dimensions": ({"mask": CAUSAL[0, 0]}, {"mask": CAUSAL}),
    "cross attention": ({"states": STATES}, {"states": STATES}),
}


@pytest.mark.parametrize("repeat", [False, True], ids=["enable_gqa", "repeated keys"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_over_the_prefix_and_the_tokens(case, repeat):
    block = grouped(repeat=repeat)
    given, meant = CASES[case]
    expected = written_out(block, X, **meant)
    output = block(X, **given)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(output.shape)
    actual = torch.autograd.grad((output * weight).sum(), list(block.prefix.parameters()))
    oracle = torch.autograd.grad((expected * weight).sum(), list(block.prefix.parameters()))
    for found, right in zip(actual, oracle, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_no_token_sees_the_prefix():
    block = grouped()
    mask = torch.zeros(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
    meant = torch.full(mask.shape, -torch.inf)
    torch.testing.assert_close(block(X, mask=mask).double(), written_out(block, X, mask=meant), rtol=1e-5, atol=1e-5)


def test_a_mask_is_extended_to_the_left():
    mask = torch.tensor([[True, False]])
    assert mask_with_prefix(mask, 2, 1).tolist() == [[True, True, False]]
    assert mask_with_prefix(mask.float(), 2, 1).tolist() == [[0, 1, 0]]
    assert mask_with_prefix(torch.tensor([[-1.0]]), 2, 1).tolist() == [[0, -1, -1]]


class Outer(GroupedAttention):
    """Attention whose output another attention block reads, in its own forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(super().forward(x))


def test_of_nested_blocks_only_the_innermost_acts():
    torch.manual_seed(0)
    inner = GroupedAttention()
    outer = adapted(Outer(inner))
    plain = copy.deepcopy(outer)
    for parameter in inner.prefix.parameters():
        parameter.data *= 40
    plain.inner = nn.Identity()
    x = plain(X).detach()
    torch.testing.assert_close(outer(X).double(), written_out(inner, x), rtol=1e-5, atol=1e-5)


def test_a_block_of_one_head_without_a_dimension_of_heads():
    class OneHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    torch.manual_seed(0)
    block = adapted(OneHead())
    x = torch.randn(BATCH, TOKENS, 4)
    q, k, v = block.qkv(x).chunk(3, -1)
    k, v = (torch.cat([p.expand(BATCH, -1, -1), y], 1) for p, y in ((block.prefix.K, k), (block.prefix.V, v)))
    torch.testing.assert_close(block(x), (q @ k.mT / 2).softmax(-1) @ v)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_one_graph_when_compiled(causal):
    block = grouped()
    expected = block(X, causal=causal)
    output = torch.compile(block, fullgraph=True, backend="aot_eager")(X, causal=causal)
    torch.testing.assert_close(output, expected)
    actual, oracle = (torch.autograd.grad(y.sum(), block.prefix.K) for y in (output, expected))
    torch.testing.assert_close(actual, oracle)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_block_gives_the_same_gradients_bit_for_bit(use_reentrant):
    block, x = grouped(), X.clone().requires_grad_()
    block(x, causal=True).sum().backward()
    plain = [p.grad.clone() for p in (x, *block.prefix.parameters())]
    block.zero_grad(), x.grad.zero_()
    checkpoint(block, x, None, None, True, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip((x, *block.prefix.parameters()), plain, strict=True))


class ChecksItself(GroupedAttention):
    use_reentrant: bool | None = None

    def forward(self, x):
        if self.use_reentrant is None:
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_inside_the_block_is_refused(use_reentrant):
    block = adapted(ChecksItself())
    block.use_reentrant = use_reentrant
    with pytest.raises(RuntimeError, match=r"`attn` calls .* inside a checkpoint .* Checkpoint the block from outside"):
        block(X.clone().requires_grad_())
    block.use_reentrant = None
    checkpoint(block, X.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()  # the remedy
    assert block.prefix.K.grad.any()


def test_double_use_sums_the_gradients():
    block = grouped()
    (block(X).sum() + block(STATES).sum()).backward()
    both = block.prefix.K.grad.clone()
    parts = [torch.autograd.grad(block(x).sum(), block.prefix.K)[0] for x in (X, STATES)]
    torch.testing.assert_close(both, sum(parts))


def test_attention_without_the_kernel_is_an_error_with_the_switches():
    class Switched(GroupedAttention):
        eager = False

        def forward(self, x):
            return self.o_proj(x) if self.eager else super().forward(x)

    block = adapted(Switched())
    block.eager = True
    with pytest.raises(RuntimeError, match=r"`attn` computed .* attn_implementation='sdpa'.*exclude=\['attn'\]"):
        block(X)


def test_other_sizes_than_in_the_trial_run_are_an_error():
    block = grouped()
    block.q_proj.out_features = 8  # the size of a head that its forward reads
    with pytest.raises(RuntimeError, match=r"`attn` has a prefix of shape \(2, 3, 4\).*K of shape \(2, 4, 5, 2\)"):
        block(X)


def test_nested_tensors_are_an_error():
    class Nested(GroupedAttention):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x) if x.is_nested else super().forward(x)

    block = adapted(Nested())
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match=r"`attn` got nested tensors, which cannot take a prefix. Pad"):
        block(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lowered_models_keep_the_prefix_in_fp32(dtype):
    block = grouped()
    expected = written_out(block, X)
    block.to(dtype)
    assert {p.dtype for p in block.prefix.parameters()} == {torch.float32}
    output = block(X.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)


def test_autocast():
    block = grouped()
    with torch.autocast("cpu", torch.bfloat16):
        output = block(X, causal=True)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and block.prefix.K.grad.dtype == torch.float32


def test_first_values():
    blocks = [adapted(GroupedAttention(), length=500) for _ in range(2)]
    assert torch.equal(blocks[0].prefix.K, blocks[1].prefix.K)
    assert not torch.equal(blocks[0].prefix.K, blocks[0].prefix.V)
    for values in blocks[0].prefix.parameters():
        assert abs(values.mean() / 40) < 1e-3 and abs(values.std() / 40 - 0.02) < 1e-3


def test_copies_and_pickles_give_the_same_output():
    block = grouped()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block) and torch.equal(other(X), block(X))


def test_print():
    assert "(prefix): Prefix(length=3, heads=2, features=4)" in str(grouped())
