"""Experts in one parameter: the tokens of each sample use the adapter of that sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, use_adapters
from lightning_lora.model.several.acting import choose
from lightning_lora.ops.stacked import StackedSum

ENTRIES = ["fr", {"fr": 0.5, "de": -2.0}, None, "de"]
REFUSED = r"`experts` computes with its weight, which is one for the whole batch"


class RoutedExperts(nn.Module):
    """As transformers' experts: tokens, to which experts each of them goes, and with which weights."""

    def __init__(self, count=3, dim=4, wide=6):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, wide, dim))
        self.down = nn.Parameter(torch.randn(count, dim, wide))

    def forward(self, tokens, index, weights):
        total = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            row, place = torch.where(index == expert)
            hidden = F.linear(F.linear(tokens[row], self.up[expert]).relu(), self.down[expert])
            total = total.index_add(0, row, hidden * weights[row, place, None])
        return total


class RoutedBlock(nn.Module):
    """Routes each token to two of three experts, by a router that does not learn."""

    def __init__(self):
        super().__init__()
        self.experts = RoutedExperts()
        self.router = nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.reshape(-1, 4)
        weights, index = self.router(tokens).softmax(-1).topk(2)
        return self.experts(tokens, index, weights).view(x.shape)


class CopyingBlock(nn.Module):
    """Gives every expert a copy of all tokens, as Llama 4."""

    def __init__(self):
        super().__init__()
        self.experts = CopiedExperts()

    def forward(self, x):
        return self.experts(x.reshape(-1, 4).repeat(4, 1))


class CopiedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 4))

    def forward(self, tokens):
        return torch.bmm(tokens.view(4, -1, 4), self.up.mT)


def several(make=RoutedBlock):
    torch.manual_seed(0)
    model = make().double()
    for name, r in {"fr": 2, "de": 1, "idle": 1}.items():
        apply_lora(model, LoRAConfig(name=name, r=r, targets=["experts.*"]))
    for _, parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return model, torch.randn(4, 5, 4, dtype=torch.float64)


def gradients(model, y):
    y.square().sum().backward()
    found = {name: parameter.grad for name, parameter in lora_parameters(model)}
    model.zero_grad()
    return found


def test_each_sample_is_that_sample_alone():
    model, x = several()
    with use_adapters(model, ENTRIES):
        mixed = model(x)
    rows = []
    for sample, entry in zip(x, ENTRIES, strict=True):
        with use_adapters(model, entry):
            rows.append(model(sample[None]))
    alone = torch.cat(rows)
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-12)
    found, expected = gradients(model, mixed), gradients(model, alone)
    for name, gradient in expected.items():
        assert (gradient is None) == ("idle" in name)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-11)


def test_a_name_that_must_be_present_gets_zeros():
    model, x = several()
    choose(model, ["fr", "fr", "de", None], [], present=["idle"])
    found = gradients(model, model(x))
    assert all(gradient is not None for gradient in found.values())
    assert not any(gradient.any() for name, gradient in found.items() if "idle" in name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_choice(reentrant):
    model, x = several()
    x.requires_grad_()
    with use_adapters(model, ENTRIES):
        expected = gradients(model, model(x))
        y = checkpoint(model, x, use_reentrant=reentrant)
    for name, gradient in gradients(model, y).items():
        torch.testing.assert_close(gradient, expected[name])


def test_what_is_noted_ends_with_the_block():
    model, _ = several()
    with use_adapters(model, ENTRIES):
        assert len(model._forward_pre_hooks) == 1
    assert not model._forward_pre_hooks
    assert model.experts.lora.acting.now() is None


def test_a_choice_for_the_whole_batch_calls_the_experts_once(monkeypatch):
    model, x = several()
    calls = []
    forward = RoutedExperts.forward
    monkeypatch.setattr(RoutedExperts, "forward", lambda *args: calls.append(len(args[1])) or forward(*args))
    for choice, counts in (("fr", [20]), (["de"] * 4, [20]), (ENTRIES, [5, 5, 5, 5]), (["fr", "de"] * 2, [10, 10])):
        calls.clear()
        with use_adapters(model, choice):
            model(x)
        assert calls == counts


def test_tokens_whose_sample_is_not_known_are_refused():
    model, x = several(CopyingBlock)
    with use_adapters(model, "fr"):
        model(x)
    with use_adapters(model, ENTRIES), pytest.raises(ValueError, match=REFUSED):
        model(x)
    model, x = several()
    with use_adapters(model, ENTRIES):
        for tokens in (x[:2], x.flatten(0, 1), x.transpose(0, 1)):
            with pytest.raises(ValueError, match=REFUSED):
                model(tokens)
    model.add_module("other", nn.LSTM(2, 2))  # batch_first=False: either dimension may be the batch
    with use_adapters(model, ENTRIES), pytest.raises(ValueError, match=REFUSED):
        model(x)


# Calls of experts with tokens, the experts of each token and their weights, in a block.
UNKNOWN = {
    "no experts of tokens": lambda experts, tokens, index, weights: experts(tokens, index.double(), weights),
    "one expert for each token": lambda experts, tokens, index, weights: experts(tokens, index[:, 0], weights),
    "another number of weights": lambda experts, tokens, index, weights: experts(tokens, index, weights[:1]),
    "a number": lambda experts, tokens, index, weights: experts(tokens, index, weights, torch.ones(())),
    "copies of tokens": lambda experts, *tensors: experts(*(tensor.repeat(2, 1) for tensor in tensors)),
    "a list of outputs": lambda experts, *tensors: experts(*tensors, finish=list),
    "one output": lambda experts, *tensors: experts(*tensors, finish=lambda y: y.sum(0, keepdim=True)),
}


class AnyExperts(RoutedExperts):
    """Takes more arguments, and weights and experts of other shapes."""

    def forward(self, tokens, index, weights, scale=None, finish=lambda y: y):
        index = index.long().view(len(tokens), -1)
        y = super().forward(tokens, index, weights.expand(index.shape) if len(weights) == 1 else weights)
        return finish(y)


class AnyBlock(nn.Module):
    """Calls its experts as asked."""

    def __init__(self):
        super().__init__()
        self.experts = AnyExperts()

    def forward(self, call, x):
        tokens = (x["x"] if isinstance(x, dict) else x).reshape(-1, 4)
        index = torch.arange(2 * len(tokens)).view(-1, 2) % 3
        return call(self.experts, tokens, index, torch.ones(len(tokens), 2).double())


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_calls_that_do_not_show_the_sample_of_each_token_are_refused(call):
    model, x = several(AnyBlock)
    with use_adapters(model, "fr"):
        model(call, x=x)
    with use_adapters(model, ENTRIES), pytest.raises(ValueError, match=REFUSED):
        model(call, x=x)


def test_the_input_of_the_block_shows_the_samples():
    def call(experts, *tensors):
        return experts(*tensors).view(-1, 5, 4)

    model, x = several(AnyBlock)
    with use_adapters(model, ENTRIES):
        mixed = model(call, x=x)
    for unknown in ({"x": x}, x[None], x.flatten(), x.view(4, 20)):
        with use_adapters(model, ENTRIES), pytest.raises(ValueError, match=REFUSED):
            model(call, x=unknown)
    with use_adapters(model, "de"):
        torch.testing.assert_close(mixed[3:], model(call, x=x)[3:])


def test_without_a_choice_the_experts_are_called_once(monkeypatch):
    model, x = several()
    with use_adapters(model, ENTRIES), disable_lora(model):
        base = model(x)
    after, calls = model(x), []
    forward = RoutedExperts.forward
    monkeypatch.setattr(RoutedExperts, "forward", lambda *args: calls.append(1) or forward(*args))
    with use_adapters(model, ENTRIES), disable_lora(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), after) and not torch.equal(after, base) and len(calls) == 2


def test_two_adapters_of_a_stack_are_two_products_of_rank_r():
    model, _ = several()
    stacked = model.experts.up
    assert isinstance(stacked, StackedSum) and type(stacked.weight) is nn.Parameter
    assert stacked.left.shape[-1] == stacked.right.shape[-2] == 2 + 1 + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiled_code_gives_nan_for_a_mixed_batch():
    model, x = several(CopyingBlock)
    compiled = torch.compile(model, backend="eager")
    with use_adapters(model, ["fr"] * 4):
        torch.testing.assert_close(compiled(x), model(x))
    with use_adapters(model, ENTRIES):
        assert compiled(x).isnan().all()
