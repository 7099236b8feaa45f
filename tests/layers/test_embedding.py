"""Embeddings: rows, and bags of rows, against the plain layer with the product in its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, merge_lora, use_adapters
from tests.helpers import oracles
from tests.helpers.layer_cases.embedding_bag import CASES
from tests.helpers.oracles import SCALE, same_bits


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer, inputs, weights = CASES[name]()
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, inputs, weights


def trained(name, **arguments):
    model, inputs, weights = build(name)
    plain = copy.deepcopy(model.layer)
    return plain, oracles.adapt(model, **arguments), inputs, weights


@pytest.mark.parametrize("name", ["sum-by-frequency", "mean-by-frequency"])
def test_gradient_of_a_is_scaled_by_frequency_as_a_row_of_the_embedding(name):
    plain, model, inputs, _ = trained(name)
    adapter = model.layer.lora.default
    model.layer(*inputs).sum().backward()
    row = SCALE * adapter.B.detach().sum(0)
    twin = copy.deepcopy(plain)
    twin(*inputs).sum().backward()  # what each row of the plain weight gets, scaled by frequency
    oracles.assert_close(adapter.A.grad, row[:, None] * twin.weight.grad[:, 0], torch.float32)


@pytest.mark.parametrize("name", [name for name in CASES if "padding" in name])
def test_the_padding_row_never_moves(name):
    plain, model, inputs, weights = trained(name)
    index = plain.padding_idx
    assert not model.layer.lora.default.A[:, index].any()
    for _ in range(3):
        model.layer(*inputs, **weights).square().sum().backward()
        for matrix in (model.layer.lora.default.A, model.layer.lora.default.B):
            matrix.data -= 0.1 * matrix.grad
    assert not model.layer.lora.default.A[:, index].any()
    merge_lora(model)
    assert same_bits(model.layer.weight[index], plain.weight[index])
    assert not same_bits(model.layer.weight, plain.weight)


def test_empty_bags_give_zeros():
    _, model, inputs, _ = trained("sum-offsets")
    assert not model.layer(*inputs)[1].any()
    assert model.layer(*inputs)[0].any()


@pytest.mark.parametrize("name", ["sum", "max-offsets", "weighted"])
def test_indices_of_32_bits_are_taken_too(name):
    _, model, inputs, weights = trained(name)
    output = model.layer(*inputs, **weights)
    assert same_bits(model.layer(*(x.int() for x in inputs), **weights), output)


def test_it_is_the_bag_of_an_adapted_embedding():
    _, model, (index,), weights = trained("weighted")
    other = nn.Sequential()
    other.add_module("layer", nn.Embedding.from_pretrained(model.layer.weight.detach().clone()))
    oracles.adapt(other)
    other.layer.lora.default.load_state_dict(model.layer.lora.default.state_dict())
    wanted = (other.layer(index) * weights["per_sample_weights"][..., None]).sum(1)
    oracles.assert_close(model.layer(index, **weights), wanted, torch.float32)


def rows_and_gradients(model, index, run=nn.Module.__call__):
    model.zero_grad()
    y = run(model, index)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def adapted_embedding(dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Embedding(10, 6, **arguments).to(dtype))
    return oracles.adapt(model)


@pytest.mark.parametrize(
    "run", [lambda m, i: m(i), lambda m, i: checkpoint(m, i, use_reentrant=False)], ids=["", "checkpointed"]
)
@pytest.mark.parametrize("shape", [(), (4,), (2, 5)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_rows_that_are_accumulated_in_place_are_those_of_the_formula(monkeypatch, arguments, shape, run):
    model = adapted_embedding(**arguments)
    index = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(1))
    wanted = rows_and_gradients(model, index)
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cpu",))
    for found, expected in zip(rows_and_gradients(model, index, run), wanted, strict=True):
        oracles.assert_close(found, expected, torch.float32)


def test_rows_in_place_under_transforms_hooks_and_in_place_code(monkeypatch):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cpu",))
    model, index, seen = adapted_embedding(), torch.randint(0, 10, (2, 5)), []
    wanted = model(index)
    assert wanted.grad_fn.name() == "FusedEmbeddingBackward"
    oracles.assert_close(torch.func.vmap(model)(index), wanted, torch.float32)
    parameters = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters() if p.requires_grad}
    both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (index,)))(parameters)
    oracles.assert_close(both[0], wanted, torch.float32)
    assert model(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 6)
    pairs = [p for p in model.parameters() if p.requires_grad]
    seeds = torch.randn(3, *wanted.shape, dtype=wanted.dtype)
    batched = torch.autograd.grad(model(index), pairs, seeds, is_grads_batched=True)
    for gradients in zip(*(torch.autograd.grad(model(index), pairs, seed) for seed in seeds), strict=True):
        oracles.assert_close(batched[0], torch.stack(gradients), torch.float32)
        batched = batched[1:]
    y = model(index)
    y += 1
    y.sum().backward()
    model.layer.lora.default.register_forward_hook(lambda *_: seen.append(1))
    oracles.assert_close(model(index), wanted, torch.float32)
    assert seen == [1] and not model.layer.weight.requires_grad


def test_rows_in_place_where_one_adapter_acts_fully(monkeypatch):
    model, index = adapted_embedding(), torch.randint(0, 10, (2, 5))
    apply_lora(model, LoRAConfig(r=2, targets=["layer"], name="other"))
    torch.nn.init.normal_(model.layer.lora.other.B)
    chosen = ["default", "other", {"other": 0.5}, ["other", "default"]]
    with torch.no_grad():
        wanted = [under(choice, model, index) for choice in chosen]
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cpu",))
    for number, (choice, expected) in enumerate(zip(chosen, wanted, strict=True)):
        y = under(choice, model, index)
        assert (y.grad_fn.name() == "FusedEmbeddingBackward") == (number < 2)
        oracles.assert_close(y, expected, torch.float32)


def under(choice, model, index):
    with use_adapters(model, choice):
        return model(index)


@pytest.mark.slow
def test_second_derivatives_of_rows_in_place(monkeypatch):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cpu",))
    model, index = adapted_embedding(), torch.randint(0, 10, (2, 5))
    pairs = [p.data.double().requires_grad_() for p in model.parameters() if p.requires_grad]
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def function(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (index,))

    assert torch.autograd.gradcheck(function, pairs) and torch.autograd.gradgradcheck(function, pairs)
