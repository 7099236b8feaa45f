"""Parameters by name, of any module, and experts' stacks: whoever reads them reads the sum, under the same name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from lightning_lora.ops.stacked import StackedSum
from tests.helpers import oracles


class Prompted(nn.Module):
    """A matrix of its own, and one of a part that only others read."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 6))
        self.inner = nn.Module()
        self.inner.mix = nn.Parameter(torch.randn(6, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.helped(x) + self.bias

    def helped(self, x):
        return x @ self.mix @ self.inner.mix


class Experts(nn.Module):
    """Indexes its stacks, one expert after the other."""

    def __init__(self, experts=3, wide=12, dim=4):
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, wide, dim)),
            nn.Parameter(torch.randn(experts, dim, wide)),
        )

    def forward(self, x):
        return sum(F.linear(F.linear(x, self.up[e]).relu(), self.down[e]) for e in range(len(self.up)))


class Transposed(Experts):
    """Keeps them as (in, out), and says so by its biases."""

    def __init__(self):
        nn.Module.__init__(self)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 12)), nn.Parameter(torch.randn(3, 12, 4))
        self.up_bias, self.down_bias = nn.Parameter(torch.zeros(3, 12)), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        hidden = torch.bmm(x.expand(3, -1, -1), self.up).relu()
        return torch.einsum("ebw,ewd->bd", hidden, self.down)


class Gathering(Experts):
    """Takes a matrix for each row."""

    def forward(self, x):
        which = torch.arange(len(x)) % len(self.up)
        hidden = torch.bmm(self.up[which], x.unsqueeze(-1)).relu()
        return (self.down[which] @ hidden).squeeze(-1)


class Grouping(Experts):
    """The grouped product of torch, for rows sorted by expert."""

    def forward(self, x):
        hidden = grouped(x, self.up.transpose(-2, -1)).relu()
        return grouped(hidden, self.down.mT)


def grouped(x, weights):
    """The first row for the first expert, none for the second, the rest for the third; torch has no fp64 for it."""
    if x.dtype == torch.float64:
        return torch.cat([x[:1] @ weights[0], x[1:] @ weights[2]])
    return F.grouped_mm(x, weights, offs=torch.tensor([1, 1, len(x)], dtype=torch.int32))


def build(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make(), torch.randn(5, 4)


CASES = {
    "matrices": (Prompted, ["mix", "inner.mix"]),
    "indexed": (Experts, ["up", "down"]),
    "transposed": (Transposed, ["up", "down"]),
    "gathered": (Gathering, ["up", "down"]),
    "grouped": (Grouping, ["up", "down"]),
}
every_case = pytest.mark.parametrize("case", CASES)


def adapted(case, r=3, **arguments):
    make, targets = CASES[case]
    model, x = build(make)
    plain = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=targets, **arguments))
    return model, plain, x


def with_products(plain, model, dtype=torch.float64):
    """``plain`` with ``2 B A`` added to each parameter by hand."""
    other = copy.deepcopy(plain).to(dtype)
    for name, holder in model.named_modules():
        for key, pair in getattr(holder, "lora", {"default": {}})["default"].items() if hasattr(holder, "lora") else []:
            delta = 2 * pair.B.detach().to(dtype) @ pair.A.detach().to(dtype)
            weight = other.get_submodule(name).get_parameter(key)
            weight.data += delta.mT if isinstance(plain, Transposed) else delta
    return other


@every_case
def test_outputs_and_gradients_are_those_of_the_sum(case):
    model, plain, x = adapted(case)
    assert oracles.same_bits(model(x), plain(x))
    oracles.train_by_hand(model)
    expected = with_products(plain, model)(x.double())
    oracles.assert_close(model(x), expected, torch.float32)
    assert not torch.allclose(expected.float(), plain(x), rtol=0.1)
    model(x).square().sum().backward()
    assert all(matrix.grad.any() for _, matrix in lora_parameters(model))
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    oracles.assert_close(model.eval()(x), model.train()(x), torch.float64)


@every_case
def test_gradients_are_those_through_the_sum(case):
    model, plain, x = adapted(case)
    oracles.train_by_hand(model)
    pairs = dict(lora_parameters(model))
    values = {name: matrix.detach().double().requires_grad_() for name, matrix in pairs.items()}
    sums = {}
    for key, weight in plain.named_parameters():
        module, _, leaf = key.rpartition(".")
        name = f"{module}.lora.default.{leaf}" if module else f"lora.default.{leaf}"
        if f"{name}.A" in values:
            delta = 2 * values[f"{name}.B"] @ values[f"{name}.A"]
            sums[key] = weight.detach().double() + (delta.mT if isinstance(plain, Transposed) else delta)
    expected = torch.func.functional_call(plain.double(), sums, (x.double(),)).sin().sum()
    found = torch.autograd.grad(model(x).sin().sum(), list(pairs.values()))
    for one, other in zip(found, torch.autograd.grad(expected, list(values.values())), strict=True):
        oracles.assert_close(one, other, torch.float32)


@every_case
def test_the_life_of_it(case):
    model, plain, x = adapted(case)
    parameters, kinds = dict(plain.named_parameters()), [type(module) for module in plain.modules()]
    oracles.train_by_hand(model)
    trained = model(x)
    for other in (copy.deepcopy(model), oracles.saved_and_loaded(model)):
        assert oracles.same_bits(other(x), trained)
    with disable_lora(model):
        assert oracles.same_bits(model(x), plain(x))
    merge_lora(model)
    assert [type(module) for module in model.modules()] == kinds
    oracles.assert_close(model(x), trained, torch.float32)
    unmerge_lora(model)
    assert oracles.same_bits(model(x), trained)
    remove_lora(model)
    assert [type(module) for module in model.modules()] == kinds
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == parameters.keys()
    assert all(oracles.same_bits(p, parameters[name]) for name, p in model.named_parameters())


@every_case
def test_the_parameter_stays_where_it_was(case):
    make, targets = CASES[case]
    model, _ = build(make)
    before = dict(model.named_parameters())
    apply_lora(model, LoRAConfig(r=1, targets=targets))
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in before.items())
    assert list(model.state_dict())[: len(before)] == list(before) or before.keys() <= model.state_dict().keys()


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
