"""Parameters by name, of any module, and experts' stacks: whoever reads them reads the sum, under the same name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.layers.parameter import holds_experts
from lightning_lora.layers.registry import parts_of
from lightning_lora.ops.stacked import StackedSum
from tests.helpers import oracles
from tests.helpers.layer_cases.parameter import CASES, Experts, Prompted


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


def integers(*shape):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).float()  # exact


X, Y = integers(2, 5), integers(2, 4)
EXPRESSIONS = {
    "an expert": lambda w: X @ w[1].mT,
    "its transposed matrix": lambda w: X @ w[1].T,
    "t()": lambda w: X @ w[1].t(),
    "the matrix first": lambda w: w[2] @ X.mT,
    "some experts": lambda w: torch.bmm(w[[0, 2]], X.mT.expand(2, 5, 2)),
    "a slice of them": lambda w: torch.bmm(w[1:], X.mT.expand(2, 5, 2)),
    "experts of rows": lambda w: w[torch.tensor([2, 1])] @ X.unsqueeze(-1),
    "another dtype": lambda w: X.double() @ w[0].to(torch.float64).mT,
    "contiguous": lambda w: Y @ w.transpose(1, 2).contiguous()[0].mT,
    "einsum": lambda w: torch.einsum("bd,ewd->ebw", X, w),
    "einsum, transposed": lambda w: torch.einsum("ewd, bw -> ebd", w, Y),
    "einsum of a list": lambda w: torch.einsum("bd,ewd->bw", [X, w]),
    "einsum by numbers": lambda w: torch.einsum(X, [0, 1], w, [2, 3, 1], [2, 0, 3]),
}
BUILT = {
    "a vector": lambda w: w @ X[0],
    "a matrix by keyword": lambda w: F.linear(X, weight=w[1]),
    "a product of two": lambda w: w @ w.mT,
    "a linear input": lambda w: F.linear(w, X),
    "einsum with an ellipsis": lambda w: torch.einsum("bd,...wd->b...w", X, w),
    "einsum without an arrow": lambda w: torch.einsum("bd,ewd", X, w),
    "einsum of two": lambda w: torch.einsum("ewd,ewd->e", w, w),
    "indices of rows": lambda w: w[torch.tensor([[0, 1], [2, 0]])] + w[:, 1:3].sum(),
    "rows of an expert": lambda w: w[1][torch.tensor([0, 2])] + w[1][1:3],
    "reversed dimensions": lambda w: w.permute(2, 1, 0),
    "a keyword": lambda w: w.sum(dim=0) + torch.sum(w, dim=-1).sum(),
    "an argument by keyword": lambda w: torch.add(X.sum(), other=w),
    "operators": lambda w: (-w + 1) * 2 - (1 + w) / 2 + w**2 + 2 * w + (3 - w) - (w - 3),
    "comparisons": lambda w: (w > 0).float() - (w < 1).float(),
}


@pytest.mark.parametrize("name", [*EXPRESSIONS, *BUILT])
def test_a_lazy_sum_has_the_values_of_the_sum(name, monkeypatch):
    W, left, right = integers(3, 4, 5), integers(3, 4, 2), integers(3, 2, 5)
    expression, built = (EXPRESSIONS | BUILT)[name], []
    expected = expression(W + left @ right)
    materialize = StackedSum.materialize
    monkeypatch.setattr(StackedSum, "materialize", lambda self: built.append(1) or materialize(self))
    assert torch.equal(expression(StackedSum(W, left, right)), expected)
    assert bool(built) == (name in BUILT)


@pytest.mark.parametrize(
    "fact",
    [
        *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_nested"),
        *("dim", "size", "numel", "stride", "element_size", "data_ptr", "is_contiguous", "is_floating_point"),
    ],
)
def test_a_fact_of_the_weight_builds_no_sum(fact, monkeypatch):
    W = integers(3, 4, 5)
    lazy = StackedSum(W, integers(3, 4, 2), integers(3, 2, 5))
    monkeypatch.delattr(StackedSum, "materialize")
    known, expected = getattr(lazy, fact), getattr(W, fact)
    assert known == expected if not callable(known) else known() == expected()


def test_an_einsum_multiplies_in_the_order_with_few_operations():
    W, left, right = torch.randn(3, 40, 50), torch.randn(3, 40, 2), torch.randn(3, 2, 50)
    x, y = torch.randn(30, 50), torch.randn(30, 40)
    for equation, other in (("bd,ewd->ebw", x), ("bw,ewd->ebd", y)):
        with FlopCounterMode(display=False) as plain:
            torch.einsum(equation, other, W)
        with FlopCounterMode(display=False) as lazy, torch.backends.opt_einsum.flags(enabled=False):
            torch.einsum(equation, other, StackedSum(W, left, right))
        assert lazy.get_total_flops() < 1.2 * plain.get_total_flops()


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


class StackOfExperts(nn.Module):
    """Parameters of these shapes, the first of which is registered as ``None``."""

    def __init__(self, *shapes, **flags):
        super().__init__()
        self.register_parameter("none", None)
        for place, shape in enumerate(shapes):
            self.register_parameter(f"w{place}", nn.Parameter(torch.zeros(shape)))
        vars(self).update(flags)


@pytest.mark.parametrize(
    ("module", "transposed"),
    [
        (StackOfExperts((3, 24, 4), (3, 4, 12)), False),
        (StackOfExperts((3, 4, 24), (3, 12, 4)), True),
        (StackOfExperts((3, 4, 24), (3, 12, 4), is_transposed=False), False),
        (StackOfExperts((3, 24, 4), (3, 4, 12), is_transposed=True), True),
        (StackOfExperts((3, 12, 4), (3, 4)), False),
        (StackOfExperts((4, 24), (3, 4, 24), (3, 24), (3, 12, 4)), True),
    ],
)
def test_stacks_are_found_by_their_dimensions_and_their_order_by_shapes_or_a_flag(module, transposed):
    keys = [name for name, parameter in module.named_parameters() if parameter.dim() == 3]
    assert holds_experts(module) and [part.key for part in parts_of(module)] == keys
    assert {part.transposed for part in parts_of(module)} == {transposed}


def test_what_is_no_stack_of_experts():
    lazy = StackOfExperts()
    lazy.w = nn.UninitializedParameter()
    for module in (StackOfExperts(), StackOfExperts((4, 4)), lazy, Experts()):
        assert holds_experts(module) == isinstance(module, Experts)


def test_a_parameter_may_be_taken_away_and_set_as_a_tensor():
    """As FSDP does around the units of its flat parameters."""
    model, plain, _ = adapted("indexed")
    oracles.train_by_hand(model)
    delta = (model.up.materialize() - plain.up).detach()
    del model._parameters["up"]
    assert not hasattr(model, "up") and hasattr(model, "down")
    model.up = torch.ones(3, 12, 4)
    oracles.assert_close(model.up.materialize(), 1 + delta, torch.float32)


def free(weight):
    weight.untyped_storage().resize_(0)


def cut(weight):
    weight.data = weight.data[0, 0]


@pytest.mark.parametrize("shard", [free, cut])
def test_a_parameter_without_its_full_values_is_read_as_it_is(shard):
    """As FSDP reads the attribute of memory that it freed, and of shards in one dimension."""
    model, _, _ = adapted("indexed")
    weight = model._parameters["up"]
    shard(weight)
    assert model.up is weight


class InitializedByApply(Experts):
    """Names ``apply`` in a method that does not read its stacks."""

    def __init__(self):
        super().__init__()
        self.apply(lambda module: None)


def test_a_method_of_the_name_apply_builds_no_sum():
    model = InitializedByApply()
    apply_lora(model, LoRAConfig(targets=["up", "down"]))
    assert isinstance(model.up, StackedSum)


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


class Reads(torch.autograd.Function):
    """Reads a stack of three dimensions in some way."""

    @staticmethod
    def forward(ctx, weight, read):
        return read(weight)

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError


@pytest.mark.parametrize(
    "read", [lambda w: w[0].sum(), lambda w: w.mT.sum(), lambda w: w.T, lambda w: w.sum(), lambda w: torch.sum(w)]
)
def test_no_read_in_an_autograd_function_loses_a_gradient_in_silence(read):
    left = torch.ones(2, 4, 1, requires_grad=True)
    stack = StackedSum(torch.ones(2, 4, 3), left, torch.ones(2, 1, 3))
    with pytest.raises(RuntimeError, match="Leave it out with `exclude`"):
        Reads.apply(stack, read)
    with torch.no_grad():
        read(stack)  # a value to log needs no gradient
    Reads.apply(StackedSum(torch.ones(2, 4, 3), left.detach(), torch.ones(2, 1, 3)), read)  # frozen adapters
