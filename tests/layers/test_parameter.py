"""Parameters by name, of any module, and experts' stacks: whoever reads them reads the sum, under the same name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.ops.stacked import StackedSum
from tests.helpers import oracles
from tests.helpers.layer_cases.parameter import CASES, Prompted


def build(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make(), torch.randn(5, 4)


def adapted(case, r=3, **arguments):
    make, targets = CASES[case]
    model, x = build(make)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=targets, **arguments))
    return model, plain, x


def test_pairs_of_experts_have_the_shapes_of_the_paper():
    for case in ("indexed", "transposed"):
        model, _, _ = adapted(case)
        shapes = {name: tuple(matrix.shape) for name, matrix in lora_parameters(model)}
        assert shapes == {
            "lora.default.up.A": (3, 3, 4),
            "lora.default.up.B": (3, 12, 3),
            "lora.default.down.A": (3, 3, 12),
            "lora.default.down.B": (3, 4, 3),
        }


@pytest.mark.parametrize("case", ["indexed", "transposed", "gathered", "grouped"])
def test_no_sum_for_all_experts_is_built(case, monkeypatch):
    model, _, x = adapted(case)
    built = []
    materialize = StackedSum.materialize
    monkeypatch.setattr(StackedSum, "materialize", lambda self: built.append(self.weight.shape) or materialize(self))
    model(x).square().sum().backward()
    assert built == []


def test_what_is_not_linear_in_the_sum_gets_it_built():
    W, left, right = (torch.randint(-4, 5, shape).float() for shape in ((3, 4, 5), (3, 4, 2), (3, 2, 5)))  # exact
    lazy, total = StackedSum(W, left, right), W + left @ right
    for function in (
        torch.sin,
        torch.sum,
        lambda w: w.norm(),
        lambda w: w * 2 if isinstance(w, torch.Tensor) else w.mul(2),
    ):
        assert torch.equal(function(lazy), function(total))
    assert torch.equal(torch.cat([lazy, lazy]), torch.cat([total, total]))
    assert torch.equal(lazy[0, 1], total[0, 1]) and torch.equal(lazy[1].chunk(2)[0], total[1].chunk(2)[0])
    assert torch.equal(lazy.transpose(0, 1), total.transpose(0, 1))
    assert (lazy.shape, lazy.dtype, lazy.device, len(lazy), lazy.dim()) == (W.shape, W.dtype, W.device, 3, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bias", r"holds `bias`, which has shape \(3,\); LoRA adapts matrices, and stacks of them"),
        ("counts", r"holds `counts`, which has a weight of torch.int64"),
    ],
)
def test_parameters_that_are_no_matrices_are_refused(name, words):
    model, _ = build(Prompted)
    model.counts = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=words):
        apply_lora(model, LoRAConfig(targets=[name]))


def test_a_pattern_that_names_modules_names_no_parameters():
    model = nn.ModuleDict({"weight": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert apply_lora(model, LoRAConfig(targets=["weight"])) == ["weight"]


def test_the_weight_of_a_layer_can_be_named_for_code_that_reads_it():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"fc": layer})
    apply_lora(model, LoRAConfig(r=2, targets=["fc.weight"]))
    oracles.train_by_hand(model)
    pair = layer.lora.default["weight"]
    x = torch.randn(3, 4)
    assert not torch.allclose(F.linear(x, layer.weight), F.linear(x, dict(layer.named_parameters())["weight"]))
    oracles.assert_close(layer.weight, dict(layer.named_parameters())["weight"] + pair.B @ pair.A, torch.float32)
    oracles.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), torch.float32)


class Squared(torch.autograd.Function):
    """A product that is written with its own backward, as fused kernels are."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return torch.bmm(gradient, weight.mT), torch.bmm(x.mT, gradient)


def helper(x, weight):
    return Squared.apply(x, weight)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return Squared.apply(x, self.w)


class FusedByHelper(Fused):
    def forward(self, x):
        return helper(x, self.w)


class Around(nn.Module):
    """Passes the parameter of another module to the function."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ParameterDict({"w": torch.randn(2, 4, 3)})

    def forward(self, x):
        return Squared.apply(x, self.inner["w"] if hasattr(self, "never") else self.inner.w)


@pytest.mark.parametrize("make", [Fused, FusedByHelper])
def test_a_stack_that_goes_through_an_autograd_function_gets_its_gradient(make):
    x, model = torch.randn(2, 5, 4), nn.ModuleDict({"layer": make()})
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=2, targets=["layer.w"]))
    oracles.train_by_hand(model)
    pair = model.layer.lora.default["w"]
    A, B = (matrix.detach().requires_grad_() for matrix in (pair.A, pair.B))
    left, right = (m.detach() for m in pair.factors(plain.layer.w))
    expected = torch.bmm(x, plain.layer.w.detach() + left @ right)
    for matrix in (pair.A, pair.B):
        matrix.grad = None
    output = model.layer(x)
    oracles.assert_close(output, expected, torch.float32)
    output.square().sum().backward()
    delta = (B @ A) if (B @ A).shape == plain.layer.w.shape else (B @ A).mT
    torch.bmm(x, plain.layer.w.detach() + pair.scale * delta).square().sum().backward()
    oracles.assert_close(pair.A.grad, A.grad, torch.float32)
    oracles.assert_close(pair.B.grad, B.grad, torch.float32)


def test_a_stack_that_other_code_passes_to_one_is_refused():
    model = Around()
    apply_lora(model, LoRAConfig(r=2, targets=["inner.w"]))
    with pytest.raises(
        RuntimeError, match=r"passed to a torch\.autograd\.Function, which would give its adapters no grad"
    ):
        model(torch.randn(2, 5, 4))
    with torch.no_grad():
        assert model(torch.randn(2, 5, 4)).shape == (2, 5, 3)
