"""The fused ops give the same bits with a packed weight as with its matrix."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_lora.ops.fused_linear import fused_linear
from lightning_lora.ops.mixed_linear import mixed_linear
from lightning_lora.ops.mixed_products import BySample, Stacked
from lightning_lora.ops.mixture import Mixture
from lightning_lora.ops.packed.weight import PackedWeight

SAMPLES = [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]


class Counted:
    """A packed weight whose library computes ``W0 x + b`` by the matrix or not, and how often it is computed."""

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None, by_product: bool) -> None:
        self.calls, self.stored, self._matrix = 0, torch.zeros(3), matrix
        product = (lambda x: F.linear(x, matrix, bias)) if by_product else None
        self.weight = PackedWeight(self.stored, matrix.dtype, self.compute, product)

    def compute(self) -> torch.Tensor:
        self.calls += 1
        return self._matrix.clone()


def one(x, weight, bias, A, B, p):
    return fused_linear(x, weight, bias, A, B, 0.5, p)


def mixed(products):
    def run(x, weight, bias, A, B, p):
        mixture = Mixture(SAMPLES, x.device)
        return mixed_linear(x, weight, bias, [A, 2 * A, B, -B], [0.5, 0.5], mixture, p, products=products)

    return run


OPS = {"one pair": one, "for each sample": mixed(BySample), "stacked": mixed(Stacked)}


def drawn(dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    A, B = torch.randn(2, 6, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    offset = torch.randn(4, dtype=dtype) if bias else None
    return x.requires_grad_(), weight, offset, A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_product", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_values_and_gradients_and_how_often_the_matrix_is_computed(op, bias, by_product, p):
    if p and op is OPS["stacked"]:
        pytest.skip("a dropout of each pair")
    x, matrix, offset, A, B = drawn(bias=bias)
    packed = Counted(matrix, offset, by_product)
    results = []
    for weight in (matrix, packed.weight):
        torch.manual_seed(1)
        y = op(x, weight, offset, A, B, p)
        calls = packed.calls
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, A, B])])
    assert (calls, packed.calls) == (not by_product, 1 + (not by_product))
    for with_matrix, with_packed in zip(*results, strict=True):
        if by_product and not bias:  # the order of the sums is that with a bias
            torch.testing.assert_close(with_packed, with_matrix, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(with_packed, with_matrix)


def test_no_gradient_of_the_input_needs_no_matrix():
    x, matrix, offset, A, B = drawn()
    packed = Counted(matrix, offset, by_product=False)
    fused_linear(x.detach(), packed.weight, offset, A, B, 1.0).sum().backward()
    assert packed.calls == 1 and A.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("op", [one, mixed(BySample)], ids=["one pair", "mixed"])
def test_gradients_of_every_order(op):
    x, matrix, offset, A, B = drawn(torch.float64)
    packed = Counted(matrix, offset, by_product=False)

    def function(x, A, B):
        return op(x, packed.weight, offset, A, B, 0.0)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


@pytest.mark.parametrize("op", [one, mixed(BySample)], ids=["one pair", "mixed"])
def test_a_write_between_forward_and_backward_is_an_error(op):
    x, matrix, offset, A, B = drawn()
    packed = Counted(matrix, offset, by_product=False)
    y = op(x, packed.weight, offset, A, B, 0.0)
    packed.stored.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_of_the_size_of_the_weight_is_kept():
    x, matrix, offset, A, B = drawn()
    kept: list[torch.Tensor] = []
    packed = Counted(matrix, offset, by_product=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_linear(x, packed.weight, offset, A, B, 1.0)
    assert [t.shape for t in kept] == [x.shape]  # A x is computed again where hooks pack
