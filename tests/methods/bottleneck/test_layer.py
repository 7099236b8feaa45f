"""A bottleneck against its formula, and the classes that call it."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.layers.adapted import swap_in
from lightning_lora.methods.bottleneck.layer import (
    ACTIVATIONS,
    Bottleneck,
    BottleneckLayer,
    EntryLayer,
    ParallelLayer,
)
from lightning_lora.methods.bottleneck.places import Entry, PassedInput


def random_bottleneck(features=6, size=3, **arguments):
    """A bottleneck in which nothing is zero."""
    bottleneck = Bottleneck(features, size, seed=1, site="layer", **arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return bottleneck


def x_and_y(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def formula(b, y, x):
    """Written out for the last dimension in fp64."""
    p = {name: parameter.double() for name, parameter in b.named_parameters()}
    if "norm" in p:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x * p["norm"] + p["norm_bias"]
    inner = ACTIVATIONS[b.activation](x @ p["down"].T + p["down_bias"])
    return y + b.scale * (inner @ p["up"].T + p["up_bias"])


@pytest.mark.parametrize("arguments", [{}, {"activation": "relu", "scale": 4.0}, {"norm": True, "activation": "tanh"}])
def test_formula(arguments):
    b, (x, y) = random_bottleneck(**arguments), x_and_y(2, 5, 6)
    torch.testing.assert_close(b(y), formula(b, y, y))
    torch.testing.assert_close(b(y, x), formula(b, y, x))
    assert b(y, x).dtype == torch.float64


def test_activations_are_those_of_torch():
    x = torch.linspace(-3, 3, 7)
    assert {name: function(x).tolist() for name, function in ACTIVATIONS.items()} == {
        "gelu": F.gelu(x).tolist(),
        "relu": F.relu(x).tolist(),
        "silu": F.silu(x).tolist(),
        "tanh": torch.tanh(x).tolist(),
    }


def test_initial_values():
    b = Bottleneck(100, 10, init_std=0.5, norm=True, seed=4)
    assert 0.35 < b.down.std() < 0.5  # cut off at two standard deviations
    assert b.down.abs().max() <= 1
    assert not any(parameter.any() for parameter in (b.down_bias, b.up, b.up_bias, b.norm_bias))
    assert torch.equal(b.norm, torch.ones(100))
    assert torch.equal(b.down, Bottleneck(100, 10, init_std=0.5, seed=4).down)
    assert not torch.equal(b.down, Bottleneck(100, 10, init_std=0.5, seed=5).down)


def test_the_global_random_stream_is_untouched():
    torch.manual_seed(0)
    Bottleneck(6, 3)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("norm", [False, True])
def test_number_of_parameters(norm):
    d, size = 6, 3
    count = sum(parameter.numel() for parameter in Bottleneck(d, size, norm=norm).parameters())
    assert count == 2 * size * d + size + d + norm * 2 * d


def test_features_of_a_convolution():
    b, y = random_bottleneck(channel_dim=-3), x_and_y(2, 6, 4, 5)[0]
    torch.testing.assert_close(b(y), formula(b, y.movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(b(y[0]), b(y)[0])


def test_tokens_of_experts_in_one_dimension():
    b, (x, y) = random_bottleneck(), x_and_y(2, 5, 6)
    torch.testing.assert_close(b(y.flatten(0, 1), x), formula(b, y, x).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_fp32_and_activations_keep_their_dtype(dtype):
    b = random_bottleneck(norm=True)
    before = copy.deepcopy(b.state_dict())
    model = nn.Sequential(nn.Linear(6, 6), b).to(dtype)
    y = model(torch.randn(2, 6, dtype=dtype))
    assert y.dtype == dtype
    assert all(torch.equal(value, before[name]) for name, value in b.state_dict().items())
    y.sum().backward()
    assert b.down.grad.dtype == torch.float32


def test_autocast():
    b, y = random_bottleneck(norm=True), torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert b(y).dtype == torch.float32
        assert b(y.bfloat16()).dtype == torch.bfloat16
        assert b.update(y).dtype == torch.bfloat16


def test_another_number_of_features():
    with pytest.raises(
        RuntimeError, match=r"to `layer` acts on 6 features, but the input has shape \(2, 5\)"
    ) as raised:
        random_bottleneck()(torch.ones(2, 5))
    assert "exclude=['layer']" in str(raised.value)


def test_meta_device():
    b = Bottleneck(6, 3, device="meta")
    assert b.down.is_meta
    b.to_empty(device="cpu")
    b.reset_parameters()
    assert torch.equal(b.down, Bottleneck(6, 3).down)
    assert not b.up.any()


Named = namedtuple("Named", "first second")


class Returns(nn.Module):
    """A module that returns what it is told to make of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x, other=None):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda x: (x, None), lambda output: output[0]),
        (lambda x: [x, 2], lambda output: output[0]),
        (lambda x: Named(x, 2), lambda output: output.first),
    ],
)
def test_the_first_of_several_outputs(make, first):
    layer, b, x = Returns(make), random_bottleneck(), torch.ones(2, 6)
    plain = layer(x)
    swap_in(layer, BottleneckLayer, b)
    output = layer(x)
    assert type(output) is type(plain)
    assert output[1:] == plain[1:]
    assert torch.equal(first(output), b(x))


def test_an_output_without_a_tensor():
    layer = Returns(lambda x: {"x": x})
    swap_in(layer, BottleneckLayer, random_bottleneck())
    with pytest.raises(
        TypeError, match=r"output of `layer` must be a tensor, or a tuple that starts with one, but got a dict"
    ):
        layer(torch.ones(2, 6))


def test_parallel_in_one_module():
    layer, b, x = Returns(lambda x: (2 * x, None)), random_bottleneck(scale=4.0), x_and_y(2, 6)[0]
    swap_in(layer, ParallelLayer, b)
    for output in (layer(x), layer(x=x)):
        torch.testing.assert_close(output[0], formula(b, 2 * x, x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.checkpointed = None

    def forward(self, x):
        if self.checkpointed is None:
            return self.down(F.relu(self.up(x)))
        return self.down(F.relu(checkpoint(self.up, x, use_reentrant=self.checkpointed)))


def parallel_mlp():
    model, b, passed = MLP(), random_bottleneck(), PassedInput()
    b.passed = passed
    swap_in(model.up, EntryLayer, Entry(passed))
    swap_in(model.down, ParallelLayer, b)
    return model, b


def test_parallel_over_two_layers():
    model, b = parallel_mlp()
    x = x_and_y(2, 6)[0].requires_grad_()
    expected = formula(b, MLP().double()(x), x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for model.checkpointed in (None, False):
        y = model.double()(x)
        x.grad = None
        y.sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_parallel_in_a_checkpointed_block(reentrant):
    (model, b), (plain, plain_b) = parallel_mlp(), parallel_mlp()
    x = torch.randn(2, 6, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.sum().backward()
    plain(x).sum().backward()
    assert torch.equal(b.down.grad, plain_b.down.grad)


def test_a_checkpoint_that_would_lose_gradients():
    model, _ = parallel_mlp()
    model.checkpointed = True
    with pytest.raises(RuntimeError, match="A part of the MLP that ends in `layer` is checkpointed without the rest"):
        model(torch.randn(2, 6, requires_grad=True))


def test_the_last_layer_alone():
    model, _ = parallel_mlp()
    with pytest.raises(RuntimeError, match="`layer` was called, but not the first layer of its MLP"):
        model.down(torch.ones(2, 9))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_pass_their_own_input(copied):
    model, b = parallel_mlp()
    b.passed.put(torch.ones(1, requires_grad=True) * 2)  # as an interrupt between the layers leaves it
    other = copied(model)
    assert other.down.bottleneck.passed is other.up.bottleneck.passed is not b.passed
    x = torch.randn(2, 6)
    assert torch.equal(other(x), model(x))
