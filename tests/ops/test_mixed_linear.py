"""A mixed batch in one node, against the formula written out in fp64: values, gradients, and when the op is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.ops import mixed_linear as op
from lightning_lora.ops.mixed_products import BySample, Stacked
from lightning_lora.ops.mixture import Mixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
both_ways = pytest.mark.parametrize("products", [BySample, Stacked])
SAMPLES = {
    "one each": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]],
    "some none": [[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]],
    "weights": [[0.5, 0, 0], [0, 1, 0], [0, -2.0, 0], [1, 0, 0], [0, 0.25, 0]],
    "several of one sample": [[0.5, 0.5, 0], [0, 1, 0], [0.1, 0.2, 0.3], [0, 0, 0], [0, 0, 2]],
}


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """Let the op be used on a CPU, where it is tested."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))


def tensors(dtype=torch.float64, ranks=(2, 2, 2), shape=(5, 3, 6), out=4, bias=True) -> tuple[Any, ...]:
    torch.manual_seed(0)
    adapters = torch.promote_types(dtype, torch.float32)
    x, weight = torch.randn(shape, device=DEVICE, dtype=dtype), torch.randn(out, shape[-1], device=DEVICE, dtype=dtype)
    pairs = [
        (
            torch.randn(r, shape[-1], device=DEVICE, dtype=adapters).requires_grad_(),
            torch.randn(out, r, device=DEVICE, dtype=adapters).requires_grad_(),
        )
        for r in ranks
    ]
    return x.requires_grad_(), weight, torch.randn(out, device=DEVICE, dtype=dtype) if bias else None, pairs


def every(pairs) -> list[Tensor]:
    """Every A, then every B."""
    return [A for A, _ in pairs] + [B for _, B in pairs]


def reference(x, weight, bias, pairs, scales, samples) -> Tensor:
    """Each sample alone, in fp64."""
    rows = []
    for sample, weights in zip(x.double(), samples, strict=True):
        total = weight.double()
        for (A, B), scale, c in zip(pairs, scales, weights, strict=True):
            total = total + c * scale * (B.double() @ A.double()) if c else total
        rows.append(F.linear(sample, total, None if bias is None else bias.double()))
    return torch.stack(rows)


def gradients(y: Tensor, x: Tensor, pairs) -> list[Tensor]:
    torch.manual_seed(1)
    seed = torch.randn(y.shape, dtype=torch.float64).to(y.device, y.dtype)
    matrices = [matrix for pair in pairs for matrix in pair]
    found = torch.autograd.grad(y, [x, *matrices], seed, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, [x, *matrices], strict=True)]


@both_ways
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("ranks", "scales", "bias"),
    [((2, 2, 2), (1, 1, 1), True), ((2, 5, 1), (2, 2, 2), False), ((3, 3, 3), (1, 2, 0.5), True)],
)
def test_a_sample_in_a_mixed_batch_is_that_sample_alone(products, samples, dtype, ranks, scales, bias):
    x, weight, bias, pairs = tensors(dtype, ranks, bias=bias)
    y = op.mixed_linear(x, weight, bias, every(pairs), scales, Mixture(samples, DEVICE), products=products)
    expected = reference(x, weight, bias, pairs, scales, samples)
    assert y.dtype == dtype
    pieces = zip(gradients(y, x, pairs), gradients(expected, x, pairs), strict=True)
    for got, wanted in [(y, expected), *pieces]:
        assert got.shape == wanted.shape
        got, wanted = got.detach().double(), wanted.detach().double()
        size = max(1.0, float(wanted.abs().max()))
        assert float((got - wanted).abs().max()) <= 32 * ROUNDING[dtype] * size


@both_ways
@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3, 6)])
def test_samples_of_one_position_and_of_several_dimensions(products, shape):
    x, weight, bias, pairs = tensors(shape=shape)
    y = op.mixed_linear(
        x, weight, bias, every(pairs), (1, 1, 1), Mixture(SAMPLES["weights"], DEVICE), products=products
    )
    expected = reference(x, weight, bias, pairs, (1, 1, 1), SAMPLES["weights"])
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(y, x, pairs), gradients(expected, x, pairs), strict=True):
        torch.testing.assert_close(got, wanted)


@both_ways
def test_a_pair_of_higher_rank_that_no_sample_uses_gets_zeros(products):
    x, weight, bias, pairs = tensors(ranks=(2, 2, 5))
    mixture = Mixture([[1, 0, 0], [0, 1, 0]] * 2 + [[0, 0, 0]], DEVICE)
    y = op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, products=products)
    *_, dA, dB = torch.autograd.grad(y.sum(), [x, *(matrix for pair in pairs for matrix in pair)])
    assert dA.shape == (5, 6) and not dA.any() and dB.shape == (4, 5) and not dB.any()


@pytest.mark.slow
@both_ways
def test_gradients_of_every_order(products):
    x, weight, bias, pairs = tensors(ranks=(2, 1, 1), shape=(5, 2, 3), out=2)
    mixture = Mixture(SAMPLES["several of one sample"], DEVICE)

    def function(x, *matrices):
        return op.mixed_linear(
            x, weight, bias, [*matrices[::2], *matrices[1::2]], (1, 2, 0.5), mixture, products=products
        )

    inputs = (x, *(matrix for pair in pairs for matrix in pair))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.slow
@both_ways
def test_dropout_has_one_mask_in_both_passes(products):
    x, weight, bias, pairs = tensors(ranks=(1, 1, 1), shape=(5, 2, 3), out=2)
    mixture = Mixture(SAMPLES["one each"], DEVICE)

    def function(x, *matrices):
        torch.manual_seed(3)
        pairs = list(zip(matrices[::2], matrices[1::2], strict=True))
        return op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, 0.5, products=products)

    inputs = (x, *(matrix for pair in pairs for matrix in pair))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert not torch.allclose(function(*inputs), reference(x, weight, bias, pairs, (1, 1, 1), SAMPLES["one each"]))


@both_ways
def test_a_loss_and_a_penalty_on_a_gradient_share_one_backward_with_dropout(products):
    x, weight, bias, pairs = tensors()
    mixture, (A, _) = Mixture(SAMPLES["one each"], DEVICE), pairs[0]

    def gradients_by_x(*, graph: bool) -> Tensor:
        torch.manual_seed(3)
        y = op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, 0.3, products=products)
        (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
        return torch.autograd.grad(dA.square().sum() + y.sum(), x, create_graph=graph)[0]

    assert torch.allclose(gradients_by_x(graph=False), gradients_by_x(graph=True), rtol=1e-12)


@both_ways
def test_a_value_changed_before_backward_is_an_error_where_it_is_needed(products):
    x, weight, bias, pairs = tensors()
    mixture = Mixture(SAMPLES["one each"], DEVICE)
    y = op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, products=products)
    expected = gradients(y, x, pairs)
    y = op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, products=products)
    with torch.no_grad():
        pairs[0][0].add_(1)  # backward has its own copies of A and B
    for got, wanted in zip(gradients(y, x, pairs), expected, strict=True):
        assert torch.equal(got, wanted)
    y = op.mixed_linear(x, weight, bias, every(pairs), (1, 1, 1), mixture, products=products)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, x, pairs)


@both_ways
def test_saved_are_the_input_and_the_hidden_rows_alone(products):
    x, weight, bias, pairs = tensors(shape=(5, 40, 6))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = op.mixed_linear(
            x, weight, bias, every(pairs), (1, 1, 1), Mixture(SAMPLES["one each"], DEVICE), products=products
        )
    assert sizes == [x.numel()]  # while hooks pack what is saved, A x is computed again
    got = gradients(y, x, pairs)
    wanted = gradients(reference(x, weight, bias, pairs, (1, 1, 1), SAMPLES["one each"]), x, pairs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_few_positions_are_stacked_and_many_are_not():
    mixture = Mixture([[1.0, 0.0], [0.0, 1.0]], DEVICE)
    assert op.is_stacked(torch.empty(2, 8), mixture) and op.is_stacked(torch.empty(2, 4, 8), mixture)
    assert not op.is_stacked(torch.empty(2, 4096, 8), mixture)


def test_where_it_can_be_used():
    x, weight, bias, pairs = tensors(torch.float32)
    x = x.detach()
    mixture = Mixture(SAMPLES["one each"], DEVICE)
    assert op.can_mix(x, weight, bias, every(pairs), mixture)
    assert not op.can_mix(x[:4], weight, bias, every(pairs), mixture)
    assert not op.can_mix(x.double(), weight, bias, every(pairs), mixture)
    assert not op.can_mix(x, weight, bias, every(pairs), Mixture([[0.0, 0.0, 0.0]] * 5, DEVICE))
    assert not torch.func.vmap(lambda x: torch.tensor(op.can_mix(x, weight, bias, every(pairs), mixture)))(
        copy.copy(x).expand(2, *x.shape)
    ).any()
