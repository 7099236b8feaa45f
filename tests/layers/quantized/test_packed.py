"""Layers of bitsandbytes in the fused ops, on a CPU where they are tested."""

from __future__ import annotations

import contextlib
import copy
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, use_adapters
from lightning_lora.layers.quantized import packed
from lightning_lora.layers.quantized.formats import dequantized
from lightning_lora.ops.fused_linear import FusedLinear
from lightning_lora.ops.mixed_linear import MixedLinear

bitsandbytes = pytest.importorskip("bitsandbytes")
ROWS = packed.MAX_ROWS_BY_CODES + 8  # the matrix is computed here, and by bitsandbytes for fewer


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let the ops be used on a CPU."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))


def four_bits(bias: bool = True, dtype: torch.dtype | None = torch.float32, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias=bias)
    settings = {"compute_dtype": dtype, "quant_type": "nf4"} | kwargs
    layer = bitsandbytes.nn.Linear4bit(64, 96, bias=bias, **settings)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(False)


def eight_bits(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear8bitLt(64, 96, bias=bias, has_fp16_weights=False).to("cpu").requires_grad_(False)


LAYERS = {
    "nf4, nested": four_bits,
    "fp4": lambda bias=True: four_bits(bias, quant_type="fp4", compress_statistics=False),
    "int8": eight_bits,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def adapted(layer: nn.Module, random: bool = True, **config: object) -> nn.Module:
    apply_lora(layer, LoRAConfig(r=4, alpha=6, targets="all", **config))
    if random:
        nn.init.normal_(layer.lora[next(iter(layer.lora))].B)
    return layer


def written_out(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    A, B = (parameter.double() for _, parameter in lora_parameters(layer))
    weight = dequantized(layer).double() + layer.lora.default.scale * B @ A
    return F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


def gradients(y: torch.Tensor, x: torch.Tensor, layer: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    direction = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *(p for _, p in lora_parameters(layer))], direction))


@contextlib.contextmanager
def counted(node: type = FusedLinear, times: int = 1):
    with mock.patch.object(node, "forward", wraps=node.forward) as forward:
        yield
    assert forward.call_count == times


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, ROWS])
def test_values_and_gradients_are_those_of_the_sum_written_out(make, bias, rows):
    layer, x = adapted(make(bias)), torch.randn(rows, 64, requires_grad=True)
    with counted():
        y = layer(x)
    expected = written_out(layer, x)
    for found, wanted in zip([y, *gradients(y, x, layer)], [expected, *gradients(expected, x, layer)], strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@every_layer
@pytest.mark.parametrize("rows", [5, ROWS])
def test_with_B_at_zero_the_output_has_the_bits_of_the_layer_alone(make, rows):
    layer, x = make(), torch.randn(rows, 64)
    alone = layer.train()(x)
    assert torch.equal(adapted(layer, random=False)(x), alone)


def test_a_model_in_bf16_with_an_input_in_fp32():
    layer, x = adapted(four_bits(dtype=torch.bfloat16)), torch.randn(ROWS, 64, requires_grad=True)
    with counted():
        y = layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())  # computed in bf16
    expected = written_out(layer, x)
    for found, wanted in zip([y, *gradients(y, x, layer)], [expected, *gradients(expected, x, layer)], strict=True):
        assert found.dtype == torch.float32 and (found - wanted).norm() <= 2**-6 * wanted.norm()


def test_the_dtype_of_the_first_input_is_that_of_the_layer():
    """As bitsandbytes decides where none is given."""
    layer = adapted(four_bits(dtype=None))
    with counted(times=2):
        assert layer(torch.randn(5, 64).bfloat16()).dtype == torch.bfloat16
        assert layer(torch.randn(ROWS, 64)).dtype == torch.float32
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16


class Attention3(nn.Module):
    """Three layers that read one input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v = (four_bits(dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of all that autograd and the nodes keep of one forward, without parameters."""
    seen: dict[int, int] = {}
    pending, done = [model(x).grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in done:
            continue
        done.add(node)
        tensors = list(getattr(node, "saved_tensors", ()))
        tensors += (
            [value for value in vars(node).values() if isinstance(value, torch.Tensor)]
            if hasattr(node, "__dict__")
            else []
        )
        seen |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
        pending += [following for following, _ in node.next_functions]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in seen.items() if pointer not in parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_that_share_an_input_keep_one_copy_of_it_or_itself_and_each_its_small_product(dtype):
    model = Attention3(dtype)
    for layer in (model.q, model.k, model.v):
        adapted(layer)
    x = torch.randn(ROWS, 64, requires_grad=True)
    assert kept_bytes(model, x) == ROWS * (64 + 3 * 4) * dtype.itemsize


def test_the_matrix_is_computed_once_in_forward_and_once_in_backward():
    layer, x = adapted(four_bits()), torch.randn(ROWS, 64, requires_grad=True)
    with mock.patch.object(packed, "dequantize_4bit", wraps=packed.dequantize_4bit) as computed:
        y = layer(x)
        assert computed.call_count == 1
        y.sum().backward()
        assert computed.call_count == 2


@every_layer
def test_each_sample_of_a_mixed_batch_is_that_sample_alone(make):
    layer = make()
    for name in ("fr", "de"):
        apply_lora(layer, LoRAConfig(r=2, targets="all", name=name))
        nn.init.normal_(layer.lora[name].B)
    x, entries = torch.randn(3, 4, 64), ["fr", None, {"de": 0.5}]
    with use_adapters(layer, entries), counted(MixedLinear):
        mixed = layer(x)
    for sample, y, entry in zip(x, mixed, entries, strict=True):
        with use_adapters(layer, entry), counted(times=entry is not None):
            torch.testing.assert_close(y, layer(sample), rtol=1e-4, atol=1e-4)
    mixed.sum().backward()
    assert all(parameter.grad is not None for _, parameter in lora_parameters(layer))


def compiled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


AROUND = {
    "several adapters": (lambda layer, x: layer(x), 0),
    "a hook": (lambda layer, x: layer(x), 0),
    "compiled": (compiled, 0),
    "checkpointed": (lambda layer, x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), 1),
    "without gradients": (torch.no_grad()(lambda layer, x: layer(x)), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_whatever_is_around_the_values_are_right(around):
    layer = adapted(four_bits())
    x, expected = torch.randn(ROWS, 64), None
    if around == "several adapters":
        expected = written_out(layer, x)
        apply_lora(layer, LoRAConfig(r=2, targets="all", name="second"))
    if around == "a hook":
        layer.lora.default.register_forward_hook(lambda *_: None)
    run, times = AROUND[around]
    with counted(times=times):
        y = run(layer, x)
    torch.testing.assert_close(
        y.double(), written_out(layer, x) if expected is None else expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("function", "by_codes"),
    [
        (lambda device, dtype, rows, out, inside: rows < out < inside, [True, False]),
        (lambda rows: False, [True, True]),  # of other arguments
        (None, [True, True]),
    ],
)
def test_bitsandbytes_is_asked_whether_it_multiplies_by_codes(monkeypatch, function, by_codes):
    stand_in = SimpleNamespace(**{} if function is None else {packed.PRODUCT_BY_CODES[1]: function})
    monkeypatch.setitem(sys.modules, packed.PRODUCT_BY_CODES[0], stand_in)
    ask = packed.multiplies_by_codes.__wrapped__
    assert [ask(0, torch.bfloat16, rows, 96, 100) for rows in (5, 99)] == by_codes
    assert ask(-1, torch.bfloat16, 99, 96, 100)  # a CPU


def test_a_weight_that_was_packed_anew_for_a_cpu_is_left_to_bitsandbytes():
    layer, x = adapted(four_bits(dtype=torch.bfloat16)), torch.randn(ROWS, 64)
    functional = bitsandbytes.functional
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert packed.packed_weight(layer, x, bitsandbytes.nn.Linear4bit.forward.__get__(layer)) is None


def test_without_an_adapter_that_acts_nothing_is_prepared(monkeypatch):
    monkeypatch.setattr("lightning_lora.layers.quantized.linear.packed_weight", None)
    layer, x = four_bits(dtype=torch.bfloat16), torch.randn(ROWS, 64)
    alone = layer.train()(x)
    with use_adapters(adapted(layer), None):
        assert torch.equal(layer(x), alone)


class Doubled(bitsandbytes.nn.Linear4bit):
    """A user's layer whose forward is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_of_the_users_is_called():
    layer = Doubled(64, 96, compute_dtype=torch.float32, quant_type="nf4").to("cpu").requires_grad_(False)
    x = torch.randn(ROWS, 64)
    alone = layer.train()(x)
    with counted(times=0):
        assert torch.equal(adapted(layer, random=False)(x), alone)


def test_autocast_in_another_dtype_than_the_layers():
    layer, x = adapted(four_bits(dtype=torch.float32)), torch.randn(ROWS, 64)
    with torch.autocast("cpu", torch.bfloat16), counted(times=0):
        layer(x)
    layer = adapted(four_bits(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16), counted():
        y = layer(x)
    assert y.dtype == torch.float32
    assert (y - written_out(layer, x)).norm() < 2**-6 * y.norm()


def test_a_copy_of_the_layer_has_a_weight_of_its_own():
    layer = adapted(four_bits())
    other, x = copy.deepcopy(layer), torch.randn(ROWS, 64)
    layer.weight.data.zero_()
    torch.testing.assert_close(other(x).double(), written_out(other, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), other(x))


@every_layer
@pytest.mark.parametrize("batched", [True, False])
def test_gradients_in_batches_and_of_gradients(make, batched):
    layer, x = adapted(make()), torch.randn(ROWS, 64, requires_grad=True)
    results = []
    for function in (lambda: layer(x).double(), lambda: written_out(layer, x)):
        y = function()
        if batched:
            directions = torch.stack([torch.ones_like(y), y.detach()])
            results.append(torch.autograd.grad(y, x, directions, is_grads_batched=True)[0])
        else:
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum(), layer.lora.default.B)[0])
    assert (results[0] - results[1]).norm() <= 1e-4 * results[1].norm()
