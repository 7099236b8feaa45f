"""Layers that read one input: values, gradients of every order, and everything that must not mix two readings."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, disable_lora, lora_parameters, merge_lora, remove_lora, unmerge_lora
from lightning_lora.ops import compiled_input
from tests.helpers.models import Attention


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let the ops of GPUs serve on a CPU, where they are tested."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))


class GatedBlock(Attention):
    """Attention, and an MLP with a gate: layers that share an input twice."""

    def __init__(self, features: int = 6, bias: bool = False) -> None:
        super().__init__(features, bias)
        self.gate_proj = nn.Linear(features, 2 * features, bias=bias)
        self.up_proj = nn.Linear(features, 2 * features, bias=bias)
        self.down_proj = nn.Linear(2 * features, features, bias=bias)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        x = x + super().forward(x, other)
        return x + self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def adapted(dtype: torch.dtype = torch.float64, bias: bool = False, **config: object) -> nn.Module:
    torch.manual_seed(0)
    model = GatedBlock(bias=bias).to(dtype)
    apply_lora(model, LoRAConfig(**({"r": 2, "alpha": 3, "targets": "all"} | config)))
    for _, parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.5)
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same maps, each W0 + scale * B A by torch's own operations."""

    class Plain(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pair, weight = self.layer.lora.default, self.layer._parameters["weight"]
            total = weight + pair.scale * (pair.B @ pair.A).to(weight.dtype)
            return nn.functional.linear(x, total, self.layer.bias)

    other = copy.deepcopy(model)
    for name, child in list(other.named_children()):
        setattr(other, name, Plain(child))
    return other


def gradients(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad()
    out = model(*leaves)
    out.square().sum().backward()
    trained = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("A", "B")]
    return [out.detach(), *(x.grad for x in leaves), *(p.grad.clone() for p in trained)]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_values_and_gradients_are_the_plain_maps(bias, shape):
    model, x = adapted(bias=bias), torch.randn(shape, dtype=torch.float64)
    assert_same(gradients(model, x), gradients(plain(model), x))


def test_key_and_value_of_another_input():
    model = adapted()
    x, other = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    assert_same(gradients(model, x, other), gradients(plain(model), x, other))


def test_ranks_and_scales_of_their_own():
    model = adapted(rank_pattern={"k_proj": 1, "up_proj": 4}, alpha_pattern={"v_proj": 7})
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert_same(gradients(model, x), gradients(plain(model), x))


@pytest.mark.slow
def test_gradients_of_every_order():
    model = adapted()
    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    pairs = [p for _, p in lora_parameters(model)]

    def function(x, *_):
        return model(x)

    assert torch.autograd.gradcheck(function, (x, *pairs))
    assert torch.autograd.gradgradcheck(function, (x, *pairs))


def test_bf16_as_exact_as_the_formula_with_gradients_in_fp32(monkeypatch):
    model, x = adapted(torch.bfloat16), torch.randn(4, 8, 6, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    for (_, mine), (_, wide) in zip(lora_parameters(model), lora_parameters(exact), strict=True):
        wide.data = mine.data.double()
    found, wanted = gradients(model, x), gradients(plain(exact), x.double())
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ())
    formula = gradients(model, x)
    assert [g.dtype for g in found] == [torch.bfloat16] * 2 + [torch.float32] * 14
    for mine, theirs, exact_one in zip(found, formula, wanted, strict=True):
        error, allowed = (float((t.double() - exact_one).norm() / exact_one.norm()) for t in (mine, theirs))
        assert error < 1.5 * allowed + 2**-8


def test_an_input_without_gradient_and_frozen_pairs():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    other = plain(model)
    for net in (model, other):
        net.zero_grad()
        net(x).square().sum().backward()
    for (name, mine), (_, theirs) in zip(lora_parameters(model), lora_parameters(other), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for net in (model, other):
        for name, parameter in lora_parameters(net):
            parameter.requires_grad_("up_proj" in name or ("q_proj" in name and name.endswith("B")))
            parameter.grad = None
        net(x).square().sum().backward()
    for (name, mine), (_, theirs) in zip(lora_parameters(model), lora_parameters(other), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_part_of_a_graph_leaves_nothing_for_the_next_pass():
    model = adapted()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    q, k = model.q_proj(x), model.k_proj(x)
    B = model.q_proj.lora.default.B
    torch.autograd.grad(q.sum(), [B], retain_graph=True)  # never reaches x
    torch.autograd.grad(k.sum(), [x], retain_graph=True)
    first = torch.autograd.grad(q.sum() + 2 * k.sum(), [x], retain_graph=True)[0]
    again = torch.autograd.grad(q.sum() + 2 * k.sum(), [x])[0]
    other = plain(model)
    wanted = torch.autograd.grad(other.q_proj(x).sum() + 2 * other.k_proj(x).sum(), [x])[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, wanted)


def test_a_failed_backward_leaves_nothing_for_the_next_pass():
    model = adapted()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    q, k = model.q_proj(x), model.k_proj(x)

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("on the way")

    handle = q.register_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        (q.sum() + k.sum()).backward(retain_graph=True)
    handle.remove()
    x.grad = None
    (q.sum() + k.sum()).backward()
    other = plain(model)
    wanted = torch.autograd.grad(other.q_proj(x).sum() + other.k_proj(x).sum(), [x])[0]
    torch.testing.assert_close(x.grad, wanted)


def test_a_map_that_is_not_called_gets_no_gradient():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (model.q_proj(x) * model.v_proj(x)).sum().backward()
    assert model.k_proj.lora.default.A.grad is None and model.k_proj.lora.default.B.grad is None
    assert model.q_proj.lora.default.A.grad is not None


def test_the_same_map_twice_on_one_input():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (model.q_proj(x) * model.q_proj(x) + model.k_proj(x)).sum().backward()
    other, twin = plain(model), x.detach().clone().requires_grad_()
    (other.q_proj(twin).square() + other.k_proj(twin)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def change_input(model, x):
    with torch.no_grad():
        x.add_(1)


def change_A(model, x):
    with torch.no_grad():
        model.k_proj.lora.default.A.mul_(2)


def replace_A(model, x):
    pair = model.k_proj.lora.default
    pair.A = nn.Parameter(pair.A.detach() * 2)


def put_other_values(model, x):
    x.data = torch.randn_like(x)


def change_scale(model, x):
    model.k_proj.lora.default.scale *= 2


def ask_for_a_gradient(model, x):
    x.requires_grad_()


def thaw_A(model, x):
    model.k_proj.lora.default.A.requires_grad_()


@pytest.mark.parametrize(
    "change", [change_input, change_A, replace_A, put_other_values, change_scale, ask_for_a_gradient, thaw_A]
)
def test_nothing_stale_is_found(change):
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    model.k_proj.lora.default.A.requires_grad_(change is not thaw_A)
    model.q_proj(x)
    change(model, x)
    A = model.k_proj.lora.default.A
    wanted = plain(model)
    twin = x.detach().clone().requires_grad_(x.requires_grad)
    mine, theirs = model.k_proj(x), wanted.k_proj(twin)
    torch.testing.assert_close(mine, theirs)
    (mine.sum() + 0 * A.sum()).backward()
    theirs.sum().backward()
    torch.testing.assert_close(A.grad, wanted.k_proj.layer.lora.default.A.grad)
    assert (x.grad is None) == (twin.grad is None)


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_what_was_read_without_a_graph_is_not_found_with_one(inside):
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    with inside():
        model.q_proj(x)
    y = model.k_proj(x)
    y.sum().backward()
    assert x.grad is not None and model.k_proj.lora.default.A.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_whole_or_of_each_map(reentrant):
    model = adapted()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    wanted = gradients(plain(model), x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_same(gradients(Whole(), x), wanted)
    each = copy.deepcopy(model)
    for name in ("q_proj", "v_proj", "gate_proj", "up_proj"):
        child = getattr(each, name)
        own = type(child).forward.__get__(child)
        child.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=reentrant)
    assert_same(gradients(each, x), wanted)


def test_hooks_see_their_own_layers_input_and_gradient():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    model.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    other = plain(model)
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        return lambda module, given, gave: seen.update({name: given[0].clone()})

    for name, net in (("mine", model), ("plain", other)):
        net.v_proj.register_full_backward_hook(watch(name))
    # The plain twin's own layer is called inside, without the pre-hook that the copy carries.
    other.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same(gradients(model, x), gradients(other, x))
    torch.testing.assert_close(seen["mine"], seen["plain"])


def test_copies_and_pickles_read_for_themselves():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    model.q_proj(x)  # something is there to be found
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shared = twin.q_proj.lora.default.shared_input
        assert shared is twin.k_proj.lora.default.shared_input is not model.q_proj.lora.default.shared_input
        assert_same(gradients(twin, x), gradients(plain(model), x))
    alone = copy.deepcopy(model.k_proj)
    torch.testing.assert_close(alone(x), model.k_proj(x))


def test_merge_unmerge_disable_and_remove():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    wanted = gradients(plain(model), x)
    merge_lora(model)
    torch.testing.assert_close(model(x), wanted[0])
    unmerge_lora(model)
    assert_same(gradients(model, x), wanted)
    with disable_lora(model):
        base = model(x)
    remove_lora(model)
    assert torch.equal(model(x), base)


def test_which_layers_are_asked_to_share():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(8, 4)
            self.w1, self.w2, self.w3 = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x

    model = Odd()
    apply_lora(model, LoRAConfig(r=2, targets=[name for name, _ in model.named_children()]))
    pairs = {name: child.lora.default for name, child in model.named_children()}
    together = [
        {n for n, p in pairs.items() if any(p is m for m in q.shared_input.adapters)}
        for q in pairs.values()
        if q.shared_input
    ]
    assert {frozenset(group) for group in together} == {frozenset({"to_k", "to_v"}), frozenset({"w1", "w3"})}
    assert pairs["to_q"].shared_input is None and pairs["first"].shared_input is None


class Bent(nn.Module):
    """Something before the maps, so that their input is made in the graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(torch.tanh(x), other)


def counting(products: list[int]):
    """A compiler that counts the matrix products in each graph and runs it as it is."""

    def count(graph, inputs):
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count, bw_compiler=count)


@pytest.mark.slow
def test_a_compiler_gets_one_product_for_all_of_an_inputs_A():
    torch._dynamo.reset()
    model, products = Bent(adapted()), []
    x, other = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend=counting(products), fullgraph=True)
    assert_same(gradients(compiled, x), gradients(plain_inside(model), x))
    maps, attention = 7, 2
    inputs = 4  # q, k, v; o; gate, up; down
    assert products[0] == maps + attention + inputs + maps
    assert products[1] == maps + 2 * attention + 2 * inputs + 2 * maps
    assert_same(gradients(compiled, x, other), gradients(plain_inside(model), x, other))
    assert not compiled_input.cache


def plain_inside(model: nn.Module) -> nn.Module:
    return Bent(plain(model.inner))


@pytest.mark.slow
def test_a_compiler_sees_a_write_between_two_maps():
    torch._dynamo.reset()
    model = adapted()

    def function(x):
        x = torch.tanh(x) * 1
        q = model.q_proj(x)
        x.add_(1)
        return q, model.k_proj(x)

    x = torch.randn(2, 5, 6, dtype=torch.float64)
    for inside in (torch.no_grad, torch.inference_mode):
        with inside():
            wanted = function(x)
            for mine, theirs in zip(torch.compile(function, backend="aot_eager")(x), wanted, strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_a_compiled_map_that_is_not_called_and_dropout():
    torch._dynamo.reset()
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda x: model.q_proj(x) * model.v_proj(x), backend="aot_eager")
    compiled(x).sum().backward()
    mine = [x.grad, model.q_proj.lora.default.A.grad]
    twin = plain(model)
    wanted = torch.autograd.grad((twin.q_proj(x) * twin.v_proj(x)).sum(), [x, twin.q_proj.layer.lora.default.A])
    assert_same(mine, list(wanted))
    dropping = adapted(dropout=0.5).train()
    torch.compile(dropping, backend="aot_eager")(x.detach())
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_group_with_an_A_elsewhere_falls_apart():
    torch._dynamo.reset()
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    model.k_proj.to("meta")
    for function in (model.q_proj, torch.compile(model.q_proj, backend="aot_eager")):
        torch.testing.assert_close(function(x), plain(model).q_proj(x))


def test_batched_gradients():
    model = adapted()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    seeds = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    pairs = [p for _, p in lora_parameters(model)]
    found = torch.autograd.grad(model(x), [x, *pairs], seeds, is_grads_batched=True)
    for at, seed in enumerate(seeds):
        one = torch.autograd.grad(model(x), [x, *pairs], seed)
        for mine, theirs in zip(found, one, strict=True):
            torch.testing.assert_close(mine[at], theirs)


def test_a_layers_backward_before_the_next_is_called():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    model.q_proj(x).sum().backward()
    model.k_proj(x).sum().backward()
    twin, other = x.detach().clone().requires_grad_(), plain(model)
    (other.q_proj(twin) + other.k_proj(twin)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.q_proj(x).sin().sum() + model.k_proj(x).cos().sum() + model.v_proj(x).square().sum()


def test_passes_of_several_threads_over_one_graph():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(loss_of(plain(model), x), x)[0]
    loss = loss_of(model, x)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.autograd.grad(loss, x, retain_graph=True)[0], range(200)))
    for gradient in found:
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.slow
def test_several_threads_on_one_input():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(loss_of(plain(model), x), x)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.autograd.grad(loss_of(model, x), x)[0], range(200)))
    for gradient in found:
        torch.testing.assert_close(gradient, wanted)


def test_a_pass_inside_a_pass():
    def run(net: nn.Module) -> torch.Tensor:
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6).requires_grad_()
        q, k, v = net.q_proj(x), net.k_proj(x), net.v_proj(x)
        inner = q.sum()
        k.register_hook(lambda g: g + torch.autograd.grad(inner, x, retain_graph=True)[0].sum())
        (q.sin() + k.cos() + v.exp()).sum().backward()
        return x.grad

    model = adapted()
    torch.testing.assert_close(run(model), run(plain(model)))


@pytest.mark.slow
def test_a_pass_that_never_reaches_the_input_adds_nothing_up():
    model = adapted()
    gone = []
    for _ in range(3):
        x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
        q, _, _ = model.q_proj(x), model.k_proj(x), model.v_proj(x)
        torch.autograd.grad(q.square().sum(), [model.q_proj.lora.default.B], create_graph=True)
        gone.append(weakref.ref(x))
    del x, q, _
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def test_a_step_between_forward_and_a_second_derivative_is_told():
    model = adapted(torch.float32).bfloat16()
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    for layers in ([model.o_proj], [model.q_proj, model.k_proj]):
        loss = sum(layer(x).float().square().sum() for layer in layers)
        torch.autograd.grad(loss, x, retain_graph=True)
        with torch.no_grad():
            for _, parameter in lora_parameters(model):
                parameter.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_a_backward_inside_an_autocast_region():
    model = adapted(torch.float32)

    def run(inside: bool) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 60).view(2, 5, 6).requires_grad_()
        model.zero_grad()
        loss = (model.q_proj(x) * model.k_proj(x) + model.o_proj(x)).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        return [x.grad, model.k_proj.lora.default.A.grad, model.o_proj.lora.default.B.grad]

    for mine, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_may_be_written_to_and_batched_in_part():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    pairs = [p for _, p in lora_parameters(model)]
    for gradient in torch.autograd.grad(model(x).square().sum(), pairs, create_graph=True):
        with torch.no_grad():
            gradient.mul_(2)
    q, k = model.q_proj(x), model.k_proj(x)
    seeds = torch.randn(3, *k.shape, dtype=torch.float64)
    outputs, given = (q.sum(), k), (torch.ones(3, dtype=torch.float64), seeds)
    found = torch.autograd.grad(outputs, x, given, is_grads_batched=True)[0]
    other = plain(model)
    for at, seed in enumerate(seeds):
        wanted = torch.autograd.grad((other.q_proj(x).sum(), other.k_proj(x)), x, (given[0][at], seed))[0]
        torch.testing.assert_close(found[at], wanted)


@pytest.mark.slow
def test_a_traced_graph_may_be_differentiated():
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = make_fx(lambda x: model(x))(x)
    torch.testing.assert_close(graph(x.requires_grad_()), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks itself
def test_compiled_autograd():
    torch._dynamo.reset()
    model, x = adapted(), torch.randn(2, 5, 6, dtype=torch.float64)
    wanted = gradients(model, x)
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    loss = model(leaf).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert_same([leaf.grad, *(p.grad for _, p in lora_parameters(model))], wanted[1:])
    torch._dynamo.reset()
