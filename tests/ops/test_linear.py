"""The op in one node, against an fp64 reference: values, gradients, second gradients, and when it serves."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.weight_view import Rows, WeightPart
from lightning_lora.ops.fused_linear import FusedLinear, can_fuse, fused_linear
from lightning_lora.ops.linear import linear

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}


@pytest.fixture
def on_cpu(monkeypatch):
    """Let it serve on a CPU, where it is tested."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))


def tensors(shape: tuple[int, ...], out: int, r: int, dtype: torch.dtype, bias: bool, adapters: torch.dtype):
    x, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(out, shape[-1], dtype=torch.float64)
    A, B = torch.randn(r, shape[-1], dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
    offset = torch.randn(out).to(dtype) if bias else None
    return [x.to(dtype), weight.to(dtype), offset, A.to(adapters), B.to(adapters)]


def reference(x, weight, bias, A, B, scale):
    """In fp64, of the values that the op sees."""
    wide = [tensor if tensor is None else tensor.double() for tensor in (x, weight, bias, A, B)]
    x, weight, bias, A, B = wide
    y = F.linear(x, weight) + scale * F.linear(F.linear(x, A), B)
    return y if bias is None else y + bias


def gradients(function, inputs, seed):
    x, weight, bias, A, B = [tensor if tensor is None else tensor.detach().clone() for tensor in inputs]
    for tensor in (x, A, B):
        tensor.requires_grad_()
    y = function(x, weight, bias, A, B)
    y.backward(seed.to(y.dtype))
    return y.detach(), x.grad, A.grad, B.grad


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    rows=some.sampled_from([(1,), (7,), (2, 5), (2, 3, 4)]),
    sizes=some.tuples(some.integers(1, 40), some.integers(1, 40), some.integers(1, 9)),
    dtype=some.sampled_from(list(HALF)),
    bias=some.booleans(),
    scale=some.sampled_from([0.5, 1.0, 3.0]),
    seed=some.integers(0, 2**31),
)
@example(rows=(7,), sizes=(1, 37, 1), dtype=torch.float32, bias=True, scale=1.0, seed=37)
def test_values_and_gradients_are_those_of_fp64_within_rounding(rows, sizes, dtype, bias, scale, seed):
    torch.manual_seed(seed)
    inside, out, r = sizes
    adapters = torch.promote_types(dtype, torch.float32)
    inputs = tensors((*rows, inside), out, r, dtype, bias, adapters)
    gradient = torch.randn(*rows, out).to(dtype)
    seen = [t if t is None else t.to(dtype).double() for t in inputs]
    wanted = gradients(lambda *t: reference(*t, scale), seen, gradient.double())
    found = gradients(lambda *t: fused_linear(*t, scale), inputs, gradient)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, adapters, adapters]
    for one, other in zip(found, wanted, strict=True):
        size = max(1.0, float(other.abs().max()), max(inside, out) ** 0.5 * r)  # gradients sum over the outputs
        assert one.shape == other.shape
        assert float((one.double() - other).abs().max()) <= 24 * HALF[dtype] * size * max(1, scale)


@pytest.mark.slow
def test_gradients_of_every_order():
    torch.manual_seed(0)
    x, weight, bias, A, B = tensors((2, 3, 5), 4, 2, torch.float64, True, torch.float64)
    for tensor in (x, A, B):
        tensor.requires_grad_()

    def function(x, A, B):
        return fused_linear(x, weight, bias, A, B, 0.5)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_strided_input_and_an_input_without_gradient():
    torch.manual_seed(0)
    inputs = tensors((4, 3, 6), 5, 2, torch.float32, True, torch.float32)
    turned = inputs[0].transpose(0, 1)
    y = fused_linear(turned, *inputs[1:], 2.0)
    torch.testing.assert_close(y.double(), reference(turned, *inputs[1:], 2.0), rtol=1e-5, atol=1e-5)
    A, B = (matrix.requires_grad_() for matrix in inputs[3:])
    fused_linear(turned, *inputs[1:3], A, B, 2.0).sum().backward()
    assert A.grad is not None and B.grad is not None and turned.grad is None


def model(dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False)).to(dtype)
    apply_lora(net, LoRAConfig(**({"r": 2, "alpha": 3, "targets": "all"} | config)))
    for name, parameter in lora_parameters(net):
        if name.endswith("B"):
            nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_as_by_the_plain_formula(on_cpu, dtype, monkeypatch):
    one = model(dtype)
    other, x = copy.deepcopy(one), torch.randn(4, 6, dtype=dtype)
    with mock.patch.object(FusedLinear, "forward", wraps=FusedLinear.forward) as applied:
        one(x).float().square().mean().backward()
    assert applied.call_count == 2
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ())
    other(x).float().square().mean().backward()
    for (name, mine), (_, plain) in zip(lora_parameters(one), lora_parameters(other), strict=True):
        assert mine.grad.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine.grad, plain.grad, rtol=tolerance, atol=tolerance, msg=name)


def test_it_starts_as_the_base_and_rests_with_it(on_cpu):
    base = nn.Linear(6, 8)
    layer, x = copy.deepcopy(base), torch.randn(4, 6)
    apply_lora(layer, LoRAConfig(r=2, targets="all"))
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    layer.lora.enabled = False
    assert torch.equal(layer(x), base(x))


def parts(net: nn.Module) -> tuple[torch.Tensor, ...]:
    layer = net[0]
    return layer.weight, layer.bias, layer.lora.default.A, layer.lora.default.B


def test_where_it_serves(on_cpu):
    net, x = model(), torch.randn(4, 6)
    assert can_fuse(x, *parts(net))
    assert not can_fuse(x.double(), *parts(net))  # another dtype: torch says so by itself
    assert not can_fuse(torch.empty(0, 6), *parts(net))
    assert not can_fuse(nn.Parameter(x), *parts(net))  # a class of its own
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert can_fuse(x, *parts(net)) and can_fuse(x.bfloat16(), *parts(net))
        assert not can_fuse(x.double(), *parts(net))  # which autocast leaves alone
    net[0].weight.requires_grad_()
    assert not can_fuse(x, *parts(net))


def test_it_serves_no_transform_and_no_rows_of_a_fused_map(on_cpu):
    net, x = model(), torch.randn(4, 6)
    found = []
    net.register_forward_hook(lambda *_: found.append(can_fuse(x, *parts(net))))
    torch.func.grad(lambda x: net(x).sum())(x)
    torch.func.vmap(net)(x)
    with torch.autograd.forward_ad.dual_level():
        net(x)
    torch.jit.trace(net, x, check_trace=False)
    assert len(found) >= 4 and not any(found)
    part = WeightPart(rows=Rows(2, 6))
    assert LinearAdapter(6, 4, r=2, alpha=2, scale=1.0, part=part).operands() is None


def test_a_cpu_has_the_plain_formula():
    assert not can_fuse(torch.randn(4, 6), *parts(model()))


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "plain formula"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_any_number_of_pairs_by_the_one_function(monkeypatch, devices, count):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", devices)
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    pairs = [LinearAdapter(6, 4, r=r, alpha=r, scale=0.5 * r, seed=r) for r in (2, 3)[:count]]
    wanted = weight.double()
    for pair in pairs:
        nn.init.normal_(pair.B)
        wanted = wanted + pair.scale * pair.B.double() @ pair.A.double()
    y = linear(X.float(), weight, bias, pairs)
    assert_near(y, F.linear(X.float().double(), wanted, bias.double()), 1e-6)


def test_the_fused_op_asks_a_pair_for_its_operands_and_does_not_call_it(on_cpu):
    pair = LinearAdapter(6, 4, r=2, alpha=2, scale=1.0)
    with (
        mock.patch.object(pair, "operands", wraps=pair.operands) as operands,
        mock.patch.object(pair, "forward", wraps=pair.forward) as forward,
    ):
        linear(X.float(), torch.randn(4, 6), None, [pair])
    assert operands.call_count == 1 and forward.call_count == 0


def test_hooks_on_a_pair_get_the_plain_formula(on_cpu):
    net, x, seen = model(), torch.randn(4, 6), []
    with mock.patch.object(FusedLinear, "forward", wraps=FusedLinear.forward) as applied:
        net(x)
        assert applied.call_count == 2
        net[0].lora.default.register_forward_hook(lambda *_: seen.append(1))
        net(x)
    assert applied.call_count == 3 and seen == [1]


def packed_tensors(net, x):
    """How many tensors the forward of ``net`` saves where hooks pack them."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(1) or tensor, lambda tensor: tensor):
        net(x)
    return len(packed)


def test_where_hooks_pack_saved_tensors_no_more_are_saved_than_by_a_frozen_layer(on_cpu):
    net, frozen = (nn.Sequential(nn.Linear(6, 6, bias=False)).requires_grad_(False) for _ in range(2))
    apply_lora(net, LoRAConfig(r=2, targets="all"))
    x = torch.randn(4, 6, requires_grad=True)
    assert packed_tensors(net, x) == packed_tensors(frozen, x) == 1


@pytest.mark.parametrize("name", ["weight", "A", "B"])
def test_a_write_between_forward_and_backward_is_an_error(on_cpu, name):
    net, x = model(), torch.randn(4, 6, requires_grad=True)
    y = net[0](x)
    layer = net[0]
    with torch.no_grad():
        {"weight": layer.weight, "A": layer.lora.default.A, "B": layer.lora.default.B}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("config", [{"bias": "all"}, {"bias": "lora_only"}, {"also_train": ["0.bias"]}], ids=str)
def test_a_bias_trains_beside_it(on_cpu, config, monkeypatch):
    one = model(**config)
    other, x = copy.deepcopy(one), torch.randn(4, 6)
    one(x).square().mean().backward()
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ())
    other(x).square().mean().backward()
    torch.testing.assert_close(one[0].bias.grad, other[0].bias.grad)


def test_what_comes_after_may_work_in_place(on_cpu):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    apply_lora(net, LoRAConfig(r=2, targets="all"))
    for x in (torch.randn(6), torch.randn(4, 6), torch.randn(2, 4, 6)):
        y = net(x)
        y += 1
        y.sum().backward()


def test_steps_and_writes_between_forward_and_backward(on_cpu):
    net, x = model(torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    loss = net[0](x).float().square().mean()
    with torch.no_grad():
        net[0].weight.mul_(1)  # no gradient goes through it: nothing of it was kept
        net[0].lora.default.B.add_(1)  # an optimizer's step
    loss.backward()
    assert net[0].lora.default.A.grad is not None


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_who_waits_for_an_adapters_gradient_is_called(on_cpu):
    net, seen = model(), []
    net[0].lora.default.register_full_backward_hook(lambda *_: seen.append(1))
    net(torch.randn(4, 6)).sum().backward()
    assert seen == [1]


X = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def compiled(net, x):
    return torch.compile(net, fullgraph=True, backend="aot_eager")(x)


def checkpointed(net, x, reentrant):
    return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)


def by_functional_call(net, x):
    return torch.func.functional_call(net, dict(net.named_parameters()), (x,))


SURROUNDINGS = {
    "eager": lambda net, x: net(x),
    "compiled without a break": compiled,
    "checkpointed": lambda net, x: checkpointed(net, x, False),
    "checkpointed by a reentrant backward": lambda net, x: checkpointed(net, x, True),
    "functional call": by_functional_call,
    "vmap": lambda net, x: torch.func.vmap(net)(x),
    "traced": lambda net, x: torch.jit.trace(net, x, check_trace=False)(x),
    "strided": lambda net, x: net(x.transpose(0, 1).contiguous().transpose(0, 1)),
}


def written_out(net, x):
    """The two adapted layers of `model`, as formulas."""
    for layer in (net[0], net[2]):
        A, B = layer.lora.default.A.double(), layer.lora.default.B.double()
        bias = None if layer.bias is None else layer.bias.double()
        x = F.linear(x, layer.weight.detach().double() + layer.lora.default.scale * B @ A, bias)
        x = F.gelu(x) if layer is net[0] else x
    return x


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["one node", "plain formula"])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_values_and_gradients_whatever_is_around_it(monkeypatch, around, devices):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", devices)
    net = model(torch.float64)
    parameters = [parameter for _, parameter in lora_parameters(net)]
    results = []
    for run in (SURROUNDINGS[around], written_out):
        x = X.clone().requires_grad_()
        y = run(net, x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in parameters)])
        net.zero_grad()
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted, 1e-6)  # the adapters' gradients are in fp32


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["one node", "plain formula"])
def test_derivatives_of_functions_and_of_gradients(monkeypatch, devices):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", devices)
    net, x, direction = model(torch.float64), X.clone(), torch.ones_like(X)
    wide = copy.deepcopy(net)

    def total(run):
        return lambda x: run(wide, x).square().sum()

    runs = [lambda wide, x: wide(x), written_out]
    for derivative in (
        lambda function: torch.func.grad(function)(x),
        lambda function: torch.func.jvp(function, (x,), (direction,))[1],
        lambda function: torch.func.jacrev(function)(x[0, 0]),
        lambda function: penalty(function, x, wide),
    ):
        found, wanted = (derivative(total(run)) for run in runs)
        assert_near(found, wanted, 1e-6)


def assert_near(found, wanted, error):
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).detach().norm()) <= error * float(wanted.detach().norm())


def penalty(function, x, net):
    """The gradient of a gradient's size with respect to the adapters."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    found = torch.autograd.grad(gradient.square().sum(), [p for _, p in lora_parameters(net)])
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_within_its_rounding(on_cpu, dtype):
    net, x = model(), X.float()
    with torch.autocast("cpu", dtype=dtype):
        y = net(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    found = [parameter.grad.clone() for _, parameter in lora_parameters(net)]
    net.zero_grad()
    written_out(net, x.double()).square().sum().backward()
    for one, (name, parameter) in zip(found, lora_parameters(net), strict=True):
        assert one.dtype == torch.float32
        error = (one - parameter.grad).norm() / parameter.grad.norm()
        assert error < 8 * HALF[dtype], name


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["one node", "plain formula"])
@pytest.mark.parametrize("around", ["eager", "checkpointed", "checkpointed by a reentrant backward"])
def test_dropout_drops_the_adapters_input_alone(monkeypatch, devices, around):
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", devices)
    layer = model(torch.float64, dropout=0.4).train()[0]
    pair, results = layer.lora.default, []

    def written_out(layer, x):
        dropped = F.dropout(x, 0.4)
        assert (dropped == 0).float().mean() > 0.2
        y = F.linear(x, layer.weight, layer.bias)
        return y + pair.scale * dropped @ pair.A.double().T @ pair.B.double().T

    for run in (SURROUNDINGS[around], written_out):
        torch.manual_seed(3)
        x = X.clone().requires_grad_()
        run(layer, x).square().sum().backward()
        results.append([x.grad, pair.A.grad, pair.B.grad])
        layer.zero_grad()
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted, 1e-6)


@pytest.mark.slow
def test_gradients_of_every_order_with_dropout():
    torch.manual_seed(0)
    x, weight, bias, A, B = tensors((2, 3, 5), 4, 2, torch.float64, True, torch.float64)
    for tensor in (x, A, B):
        tensor.requires_grad_()

    def function(x, A, B):
        torch.manual_seed(1)
        return fused_linear(x, weight, bias, A, B, 0.5, 0.3)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_a_loss_and_a_penalty_on_a_gradient_share_one_backward_with_dropout():
    x, weight, _, A, B = tensors((3, 5), 4, 2, torch.float64, False, torch.float64)

    def gradients_of(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        torch.manual_seed(1)
        y = function(*inputs)
        (dA,) = torch.autograd.grad(y.square().sum(), inputs[1], create_graph=True)
        return torch.autograd.grad(dA.square().sum() + y.sum(), inputs)

    def written_out(x, A, B):
        dropped, _ = torch.native_dropout(x, 0.3, True)
        return x @ weight.T + 0.5 * dropped @ A.T @ B.T

    for result, expected in zip(
        gradients_of(lambda x, A, B: fused_linear(x, weight, None, A, B, 0.5, 0.3)),
        gradients_of(written_out),
        strict=True,
    ):
        assert_near(result, expected, 1e-12)


def test_a_base_that_was_thawed_is_evaluated_as_it_was_trained(on_cpu):
    net, x = model(), torch.randn(4, 6)
    with torch.no_grad():
        frozen = net(x)
    net.requires_grad_()
    assert not can_fuse(x, *parts(net))  # its weights get gradients
    with torch.no_grad():
        assert can_fuse(x, *parts(net)) and torch.equal(net(x), frozen)
