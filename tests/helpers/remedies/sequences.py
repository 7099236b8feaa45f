"""Remedies of messages about prefixes and prompts, which change what attention sees."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import PrefixConfig, PromptConfig, adapt, remove_adapted
from tests.helpers.models import EncoderBlock, GroupedAttention
from tests.helpers.remedies.case import Expected, fit, remedy

PREFIX, SITES = "methods/prefix/layer.py", "methods/prefix/sites.py"
ARGUMENTS, PROMPT = "methods/prompt/arguments.py", "methods/prompt/layer.py"
X = torch.ones(2, 5, 16)


class Blocks(nn.Module):
    """Two stacks of one block each, of which the second one can do what the test wants."""

    def __init__(self, other: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.ModuleList([EncoderBlock()])
        self.other = nn.ModuleList([EncoderBlock() if other is None else other])

    def forward(self, x: Tensor) -> Tensor:
        return self.other[0](self.first[0](x))


class Switched(GroupedAttention):
    """Its attributes say how it computes attention."""

    fused_attn, checkpointed, heads = True, False, 4

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused_attn:
            return self.o_proj(self.q_proj(x))
        self.q_proj.out_features = 4 * self.heads
        if self.checkpointed:
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def with_prefix(block: nn.Module, **arguments: object) -> nn.Module:
    adapt(model := nn.ModuleDict({"attn": block, "more": GroupedAttention()}), PrefixConfig(length=2, **arguments))
    return model


def learns(model: nn.Module, output: Tensor) -> bool:
    output.square().sum().backward()
    return any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@remedy(PREFIX, "`{}` has a prefix of shape {} (heads", "`attn`", "exclude=['attn']")
def heads_of_other_sizes(message: Expected, folder: Path) -> None:
    model = with_prefix(block := Switched())
    block.heads = 2
    with message:
        block(X)
    model = with_prefix(block := Switched(), exclude=["attn"])
    assert learns(model, model["more"](block(X)))


@remedy(PREFIX, "`{}` computed its output without", "`attn`", "fused_attn=True", "exclude=['attn']")
def the_kernel_is_switched_off(message: Expected, folder: Path) -> None:
    model = with_prefix(block := Switched())
    block.fused_attn = False
    with message:
        block(X)
    block.fused_attn = True
    assert learns(model, block(X))


@remedy(PREFIX, "`{}` calls `F.scaled_dot_product_attention` inside", "Checkpoint the block from outside")
def a_checkpoint_inside_the_block(message: Expected, folder: Path) -> None:
    model = with_prefix(block := Switched())
    block.checkpointed = True
    with message:
        block(X)
    block.checkpointed = False
    assert learns(model, checkpoint(block, X, use_reentrant=False))


@remedy(SITES, "{}, where a prefix cannot act: set its attribute", "`attn`", "`fused_attn` to True")
def the_kernel_is_off(message: Expected, folder: Path) -> None:
    block = Switched()
    block.fused_attn = False
    with message:
        with_prefix(block)
    block.fused_attn = True
    assert learns(with_prefix(block), block(X))


def llama(**arguments: object) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=9, num_key_value_heads=1, **sizes, **arguments)
    return transformers.LlamaForCausalLM(config)


TOKENS = torch.tensor([[1, 2, 3]])


@remedy(SITES, "computes attention by attn_implementation={}", "'eager'", "set_attn_implementation('sdpa')")
def attention_that_transformers_writes_out(message: Expected, folder: Path) -> None:
    model = llama(attn_implementation="eager")
    with message:
        adapt(model, PrefixConfig(length=2))
    model.set_attn_implementation("sdpa")
    for each in (model, llama(attn_implementation="sdpa")):
        adapt(each, PrefixConfig(length=2))
        assert learns(each, each(TOKENS).logits)


def with_prompts(other: nn.Module | None = None, **arguments: object) -> Blocks:
    adapt(model := Blocks(other), PromptConfig(length=2, **arguments))
    return model


class Biased(EncoderBlock):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x)


@remedy(ARGUMENTS, "`{}` gets `{}`, which depends on the {} tokens", "`other.0` gets `bias`", "exclude=['other']")
def an_argument_for_every_token(message: Expected, folder: Path) -> None:
    with message:
        with_prompts(Biased()).other[0](X, bias=torch.ones(2, 5))
    model = with_prompts(Biased(), exclude=["other"])
    assert learns(model, model.other[0](model.first[0](X), bias=torch.ones(2, 5)))


@remedy(PROMPT, "`{}` must get a sequence of shape (batch, length, features)", "`other.0`", "exclude=['other']")
def an_input_that_is_no_sequence(message: Expected, folder: Path) -> None:
    with message:
        with_prompts().other[0](X[None])
    model = with_prompts(exclude=["other"])
    assert learns(model, model.first[0](X))


class Narrow(EncoderBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x], -1))


@remedy(PROMPT, "`{}` has a prompt of {} features", "`other.0`", "exclude=['other']")
def an_input_of_other_features(message: Expected, folder: Path) -> None:
    with message:
        with_prompts(Narrow()).other[0](X[..., :8])
    model = with_prompts(Narrow(), exclude=["other"])
    assert learns(model, model.other[0](model.first[0](X)[..., :8]))


@remedy("arguments.py", "To add no {}", "`length` must be at least 1, but got 0", "leave the callback out")
def a_prompt_of_no_length(message: Expected, folder: Path) -> None:
    with message:
        PromptConfig(length=0)
    fit()


class Windows(EncoderBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 5, 16)).view(x.shape)


@remedy(PROMPT, "`{}` fails with a prompt before its tokens", "`other.0`", "shape '[-1, 5, 16]'", "exclude=['other']")
def windows_of_tokens(message: Expected, folder: Path) -> None:
    with message:
        with_prompts(Windows())(X)
    model = with_prompts(Windows(), exclude=["other"])
    assert learns(model, model(X))


class Pooling(EncoderBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


@remedy(PROMPT, "The output of `{}` must be a sequence", "`other.0`", "exclude=['other']")
def an_output_that_is_no_sequence(message: Expected, folder: Path) -> None:
    with message:
        with_prompts(Pooling())(X)
    model = with_prompts(Pooling(), exclude=["other"])
    assert learns(model, model(X))


@remedy(PROMPT, "`{}` has a table for sequences of at most {}", "at most 6", "shorter sequences or a smaller `length`")
def a_table_of_positions(message: Expected, folder: Path) -> None:
    block = EncoderBlock()
    block.register_buffer("mask", torch.ones(6, 6))
    with message:
        with_prompts(block)(X)
    remove_adapted(block)
    adapt(nn.ModuleList([block]), PromptConfig(length=1))
    assert block(X).shape == X.shape
    assert block(X[:, :3]).shape == (2, 3, 16)


@remedy(PROMPT, "`{}` gets a cache with earlier tokens as `{}`", "use_cache=False", "PrefixCallback")
def generation_after_a_prompt(message: Expected, folder: Path) -> None:
    adapt(model := llama(), PromptConfig(length=2))
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0}
    with message:
        model.generate(TOKENS, **arguments)
    assert model.generate(TOKENS, **arguments, use_cache=False).shape[1] > 3
    remove_adapted(model)
    adapt(model, PrefixConfig(length=2))
    assert model.generate(TOKENS, **arguments).shape[1] > 3


@remedy("methods/prompt/sites.py", "may be skipped in training", "`layerdrop` of Dropping", "take deep=True")
def blocks_that_may_be_skipped(message: Expected, folder: Path) -> None:
    class Dropping(Blocks):
        layerdrop = 0.1

    with message:
        adapt(Dropping(), PromptConfig())
    assert len(adapt(Dropping(), PromptConfig(deep=True))) == 2
    model = Dropping()
    model.layerdrop = 0.0
    assert len(adapt(model, PromptConfig())) == 2
