"""The projections against matrices that are built column by column, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.methods.subspace import projections
from lightning_lora.methods.subspace.projections import PROJECTIONS, dense_matrix, hadamard, project

KINDS = sorted(PROJECTIONS)


def matrix(kind: str, rows: int, dimension: int, seed: int = 3) -> Tensor:
    """P of one parameter, column by column."""
    columns = [PROJECTIONS[kind].rows(unit, seed, rows) for unit in torch.eye(dimension)]
    return torch.stack(columns, 1)


def sylvester(size: int) -> Tensor:
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_transform_is_the_product_with_hadamards_matrix(size):
    x = torch.randn(size, 3)
    torch.testing.assert_close(hadamard(x.clone()), sylvester(size) @ x)


def test_fastfood_is_the_product_of_its_five_matrices():
    """Two blocks of four rows, of which the second is cut after two."""
    [blocks] = projections._blocks(3, 6, 4, torch.device("cpu"))
    H, S = sylvester(4), torch.eye(4)[blocks.order]
    by_block = [H @ torch.diag(blocks.scales[:, b]) @ S @ H @ torch.diag(blocks.signs[:, b].float()) for b in (0, 1)]
    expected = torch.cat(by_block)[:6, :3]
    torch.testing.assert_close(matrix("fastfood", 6, 3), expected)
    assert sorted(blocks.order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dimension"), [(1, 1), (1, 5), (7, 3), (64, 16), (70, 33)])
def test_the_gradient_of_z_is_the_transposed_product(kind, rows, dimension):
    P = matrix(kind, rows, dimension)
    z = torch.randn(dimension, requires_grad=True)
    gradient = torch.randn(rows)
    delta = project(z, 3, torch.Size([rows]), kind)
    delta.backward(gradient)
    torch.testing.assert_close(delta, P @ z)
    torch.testing.assert_close(z.grad, P.T @ gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind):
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)
    shape = torch.Size([2, 3])
    assert torch.autograd.gradcheck(lambda z: project(z, 3, shape, kind), z)
    assert torch.autograd.gradgradcheck(lambda z: project(z, 3, shape, kind), z)


def test_dense_rows_are_those_of_its_matrix():
    P = dense_matrix(3, 7, 5, torch.device("cpu"))
    torch.testing.assert_close(matrix("dense", 7, 5), P)
    torch.testing.assert_close(P.square().mean(0), torch.ones(5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_nearly_orthonormal(kind):
    P = matrix(kind, 128 * 64, 50) / (128 * 64) ** 0.5
    gram = P.T @ P
    torch.testing.assert_close(gram.diag(), torch.ones(50), atol=1e-5, rtol=0)  # whole blocks
    off = gram - torch.diag(gram.diag())
    expected = (128 * 64) ** -0.5  # the standard deviation between independent columns
    assert 0.8 * expected < off.square().sum().div(50 * 49).sqrt() < 1.6 * expected
    assert off.abs().max() < 6 * expected


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_normal_numbers(kind):
    P = matrix(kind, 4096, 64)
    moments = torch.stack([(P**power).mean() for power in (1, 2, 3, 4)])
    torch.testing.assert_close(moments, torch.tensor([0.0, 1, 0, 3]), atol=0.12, rtol=0)  # 3 - 6 / width


@pytest.mark.slow
def test_a_block_that_is_cut_has_columns_of_unit_length_on_average():
    squares = torch.stack([matrix("fastfood", 5, 12, seed).square().mean() for seed in range(200)])
    assert abs(squares.mean() - 1) < 0.05


def test_values_do_not_depend_on_how_many_blocks_are_computed_at_once(monkeypatch):
    z, gradient = torch.randn(20), torch.randn(1000)
    whole = project(z, 3, torch.Size([1000]), "fastfood"), projections.Fastfood.transposed(gradient, 3, 20)
    monkeypatch.setattr(projections, "NUMBERS_IN_CACHE", 96)
    parts = project(z, 3, torch.Size([1000]), "fastfood"), projections.Fastfood.transposed(gradient, 3, 20)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gives_zero(kind):
    assert not project(torch.zeros(20), 3, torch.Size([5, 9]), kind).any()


def test_rows_of_two_parameters_differ():
    P, other = matrix("fastfood", 64, 16), matrix("fastfood", 64, 16, seed=4)
    assert abs((P * other).mean()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_projection_gives_the_same(kind):
    z = torch.randn(10, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return project(z, 3, torch.Size([9, 7]), kind).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), eager)
    torch._dynamo.reset()


def test_autocast_changes_nothing():
    z = torch.randn(10, requires_grad=True)
    plain = project(z, 3, torch.Size([64]), "fastfood")
    with torch.autocast("cpu", torch.bfloat16):
        cast = project(z, 3, torch.Size([64]), "fastfood")
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_a_sparse_gradient_of_an_embedding():
    z = torch.randn(4, requires_grad=True)
    index = torch.tensor([0, 2, 2])
    grads = []
    for sparse in (False, True):
        weight = project(z, 3, torch.Size([5, 3]), "fastfood")
        out = torch.nn.functional.embedding(index, weight, sparse=sparse)
        grads.append(torch.autograd.grad(out.square().sum(), z)[0])
    torch.testing.assert_close(*grads)
