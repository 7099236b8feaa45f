"""Reentrant activation checkpointing behind a frozen embedding: every adapter gets its gradient all the same."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils import checkpoint as rematerialize
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from lightning_lora.model.hooks import GraphStart, is_reentrant
from tests.helpers import oracles, zoo


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, index):
        x = self.embed(index)
        x += 1  # in place, as some code does
        for layer in self.layers:
            x = self.run(layer, x)
        return x

    def run(self, layer, x):
        return layer(x)


class Reentrant(Model):
    def run(self, layer, x):
        return checkpoint(layer, x, use_reentrant=True)


class Unsaid(Model):
    def run(self, layer, x):
        return rematerialize.checkpoint(layer, x)


class RunTwice(torch.autograd.Function):
    """As the function of a reversible network: its layer runs without gradients, and again in the backward pass."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.x = layer, x.detach()
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        y.backward(gradient)
        return x.grad, None


class Reversible(Model):
    def run(self, layer, x):
        return RunTwice.apply(x, layer)


class Doubled(torch.autograd.Function):
    """A function that runs no module."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Custom(Model):
    def run(self, layer, x):
        return Doubled.apply(layer(x))


class NotReentrant(Model):
    def run(self, layer, x):
        return checkpoint(layer, x, use_reentrant=False)


class Pixels(Reentrant):
    """No embedding: the input is a number, and the first layer is a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(1, 4, 1)

    def forward(self, x):
        return self.run(self.layers[0], self.embed(x).mT)


INDEX = torch.tensor([1, 5, 3])


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def gradients(model, x=INDEX):
    oracles.train_by_hand(model)
    model(x).square().sum().backward()
    return {name: matrix.grad for name, matrix in lora_parameters(model)}


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("make", [Reentrant, NotReentrant, Reversible])
def test_gradients_are_those_without_checkpointing(make):
    plain = Model()
    model = make()
    model.load_state_dict(plain.state_dict())
    for one in (plain, model):
        apply_lora(one, LoRAConfig(r=2, targets="all"))
    found = gradients(model)
    for name, expected in gradients(plain).items():
        assert oracles.same_bits(found[name], expected), name


@pytest.mark.parametrize(
    ("make", "expected"),
    [(Model, False), (Reentrant, True), (Unsaid, True), (NotReentrant, False), (Reversible, True), (Custom, False)],
)
def test_what_reenters_is_seen_in_the_code(make, expected):
    model = make()
    assert is_reentrant(model) is expected
    apply_lora(model, LoRAConfig(targets="all"))
    assert bool(hooks(model)) is expected


@pytest.mark.parametrize("flag", ["grad_checkpointing", "gradient_checkpointing"])  # of timm, of transformers
def test_a_flag_that_is_off_says_more_than_the_code(flag):
    module = Reentrant()
    assert is_reentrant(module)
    setattr(module, flag, False)
    assert not is_reentrant(module)


def test_a_first_layer_that_is_no_embedding():
    model = Pixels()
    apply_lora(model, LoRAConfig(r=2, targets=["layers.0"]))
    found = gradients(model, torch.randn(2, 1, 5))
    assert all(grad.any() for grad in found.values())


def test_hooks_come_once_and_go_with_the_adapters():
    model = Reentrant()
    model.embed.register_forward_hook(mine := lambda *_: None)
    for _ in range(2):
        apply_lora(model, LoRAConfig(r=2, targets="all"))
    assert [type(hook) is GraphStart for hook in hooks(model)] == [False, True]
    assert any(isinstance(hook, GraphStart) for hook in hooks(copy.deepcopy(model)))
    merge_lora(model)
    assert hooks(model) == [mine]
    unmerge_lora(model)
    assert len(hooks(model)) == 2
    remove_lora(model)
    assert hooks(model) == [mine]


def test_nothing_asks_for_gradients_without_need():
    model = Reentrant()
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    with torch.no_grad():
        assert not model.embed(INDEX).requires_grad
    model.embed.requires_grad_()
    assert model.embed(INDEX).grad_fn is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["llama", "bert_classifier", "t5", "vit"])
def test_checkpointing_of_hugging_face(case, reentrant):
    transformers.logging.set_verbosity_error()
    model, inputs = zoo.build(zoo.CASES[case])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    apply_lora(model.train(), LoRAConfig(r=2, targets="attn"))
    assert any(isinstance(hook, GraphStart) for hook in hooks(model)) is reentrant
    oracles.train_by_hand(model)
    zoo.output(model, inputs).square().sum().backward()
    assert [name for name, matrix in lora_parameters(model) if matrix.grad is None] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own tracing of an autograd.Function
def test_a_model_that_checkpoints_compiles_without_a_graph_break():
    model = NotReentrant()
    apply_lora(model, LoRAConfig(r=2, targets=["layers.0", "layers.1", "layers.2"]))
    model.embed.register_forward_hook(GraphStart())
    eager = model(INDEX)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(INDEX)
    assert torch.allclose(compiled, eager, atol=1e-6)
    embedded = torch.compile(model.embed, backend="aot_eager", fullgraph=True)(INDEX)
    assert embedded.requires_grad
    compiled.sum().backward()
    assert all(parameter.grad is not None for _, parameter in lora_parameters(model))
