"""The sums with their graph: values, gradients of several passes, layers without a gradient, second derivatives."""

import pytest
import torch

from lightning_lora.ops.sums.batch import Block
from lightning_lora.ops.sums.weight_sums import BatchedSums, with_graph

SCALE = 0.5
SHAPES = [(4, 3), (5, 2), (4, 3)]
KINDS = [[0, 2], [1]]
BLOCKS = [Block(i, 0, rows) for i, (rows, _) in enumerate(SHAPES)]


def made():
    weights = [torch.randn(shape, dtype=torch.double) for shape in SHAPES]
    lefts = tuple(torch.randn(rows, 2, dtype=torch.double, requires_grad=True) for rows, _ in SHAPES)
    rights = tuple(torch.randn(2, columns, dtype=torch.double, requires_grad=True) for _, columns in SHAPES)
    return weights, lefts, rights


def written_out(weights, lefts, rights):
    return [weight + SCALE * left @ right for weight, left, right in zip(weights, lefts, rights, strict=True)]


def outputs_of(weights, lefts, rights, indices=(0, 1, 2)):
    sums = BatchedSums(weights, KINDS, BLOCKS, lefts, rights, SCALE, torch.double)
    if len(indices) < len(weights):
        sums.compute()
    return with_graph(sums, indices, indices, [lefts[i] for i in indices], [rights[i] for i in indices])


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0, 1)])
def test_gradients_of_what_was_used(used):
    weights, lefts, rights = made()
    outputs = outputs_of(weights, lefts, rights)
    expected = written_out(weights, lefts, rights)
    factors = lefts + rights
    found = torch.autograd.grad(sum(outputs[i].square().sum() for i in used), factors, allow_unused=True)
    wanted = torch.autograd.grad(sum(expected[i].square().sum() for i in used), factors, allow_unused=True)
    for gradient, other in zip(found, wanted, strict=True):
        assert (gradient is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(gradient, other)


ROWS = {"all": ((0, 2), (2, 4), (4, 6)), "some": ((0, 2), (4, 6)), "of two sizes": ((0, 1), (2, 6))}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)])
def test_pairs_of_some_rows_of_a_weight(rows, used):
    weights = [torch.randn(6, columns, dtype=torch.double) for columns in (4, 4, 3)]
    blocks = [Block(i, *edges) for i in (0, 1) for edges in rows] + [Block(2, 0, 6)]
    sizes = [block.stop - block.start for block in blocks]
    kinds = [[i for i, block in enumerate(blocks) if block.weight < 2 and sizes[i] == size] for size in {*sizes[:-1]}]
    lefts = tuple(torch.randn(size, 2, dtype=torch.double, requires_grad=True) for size in sizes)
    rights = tuple(torch.randn(2, len(weights[b.weight][0]), dtype=torch.double, requires_grad=True) for b in blocks)
    sums = BatchedSums(weights, [*kinds, [len(blocks) - 1]], blocks, lefts, rights, SCALE, torch.double)
    outputs = with_graph(sums, range(3), range(len(blocks)), lefts, rights)
    expected = list(weights)
    for (index, start, stop), left, right in zip(blocks, lefts, rights, strict=True):
        above, here, below = expected[index].tensor_split((start, stop))
        expected[index] = torch.cat([above, here + SCALE * left @ right, below])
    for output, total in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, total)
    present, wanted = (
        torch.autograd.grad(sum(each[i].pow(3).sum() for i in used), lefts + rights, allow_unused=True)
        for each in (outputs, expected)
    )
    for gradient, other in zip(present, wanted, strict=True):
        assert (gradient is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(gradient, other)


def test_a_sum_of_some_rows_is_differentiated_twice():
    weight, blocks = torch.randn(5, 3, dtype=torch.double), [Block(0, 0, 2), Block(0, 3, 5)]
    lefts = [torch.randn(2, 2, dtype=torch.double, requires_grad=True) for _ in blocks]
    rights = [torch.randn(2, 3, dtype=torch.double, requires_grad=True) for _ in blocks]

    def total(*factors):
        sums = BatchedSums([weight], [[0, 1]], blocks, factors[:2], factors[2:], SCALE, torch.double)
        return with_graph(sums, [0], [0, 1], factors[:2], factors[2:])[0].square().sum()

    assert torch.autograd.gradcheck(total, (*lefts, *rights)) and torch.autograd.gradgradcheck(total, (*lefts, *rights))


def test_two_backward_passes_go_through_one_graph():
    weights, lefts, rights = made()
    first, second, _ = outputs_of(weights, lefts, rights)
    first.sum().backward()
    second.sum().backward()  # no `retain_graph`: the passes share the node, not the losses
    torch.testing.assert_close(lefts[1].grad, SCALE * torch.ones(5, 2, dtype=torch.double) @ rights[1].detach().T)
    assert lefts[2].grad is None


def test_one_layer_alone():
    weights, lefts, rights = made()
    (output,) = outputs_of(weights, lefts, rights, (1,))
    torch.testing.assert_close(output, written_out(weights, lefts, rights)[1])
    output.sum().backward()
    assert lefts[0].grad is None and lefts[1].grad is not None


def test_it_is_differentiated_twice():
    weights, lefts, rights = made()

    def total(*factors):
        return sum(output.square().sum() for output in outputs_of(weights, factors[:3], factors[3:]))

    assert torch.autograd.gradcheck(total, lefts + rights) and torch.autograd.gradgradcheck(total, lefts + rights)


def test_a_second_derivative_after_a_write_is_refused():
    weights, lefts, rights = made()
    output = outputs_of(weights, lefts, rights)[0]
    torch.autograd.grad(output.square().sum(), lefts[0], create_graph=True)  # backward before a step
    with torch.no_grad():
        lefts[0].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* Call backward before a step"):
        torch.autograd.grad(output.square().sum(), lefts[0], create_graph=True)


def test_done_is_called_after_a_pass():
    weights, lefts, rights = made()
    calls = []
    sums = BatchedSums(weights, KINDS, BLOCKS, lefts, rights, SCALE, torch.double)
    outputs = with_graph(sums, range(3), range(3), lefts, rights, lambda: calls.append(1))
    outputs[0].sum().backward()
    assert calls == [1]


def test_autocast_casts_the_sum_and_not_the_product():
    weight, left, right = torch.randn(8, 6), torch.randn(8, 2), torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        (total,) = BatchedSums([weight], [[0]], [Block(0, 0, 8)], (left,), (right,), 1.0, torch.bfloat16).compute()
    assert torch.equal(total, (weight + left @ right).bfloat16())
