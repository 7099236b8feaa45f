"""The sums of many layers in one launch against the formula in fp64, on a GPU or by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lightning_lora.ops.sums.batch import Block
from lightning_lora.ops.sums.plan import SumPlan, can_be_read, inner_size

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and HAS_TRITON else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # what the interpreter's NumPy has
SCALE = 0.5

# The order in which the dimensions of a weight are stored, by their number.
LINEAR, CONV, CHANNELS_LAST, CHANNELS_LAST_1D = (0, 1), (0, 1, 2, 3), (0, 2, 3, 1), (0, 2, 1)
LAYERS = [
    ((1, 1), LINEAR, 1),
    ((3, 5), LINEAR, 2),
    ((64, 48), LINEAR, 4),
    ((70, 144), LINEAR, 16),
    ((5, 4, 3, 3), CHANNELS_LAST, 3),
    ((40, 16, 3, 3), CHANNELS_LAST, 8),
    ((33, 16, 3, 3), CONV, 8),
    ((8, 1, 3, 3), CHANNELS_LAST, 2),
    ((1, 4, 3, 3), CHANNELS_LAST, 2),
    ((6, 4, 3), CHANNELS_LAST_1D, 2),
]
PLAIN = [((48, 64), LINEAR, 4), ((40, 144), LINEAR, 65)]  # what the kernels read 16 bytes at a time

kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="run by test_all_by_the_interpreter, where Triton is",
)


def interpreter_works() -> bool:
    """Triton 3.6 converts arrays to numbers in a way that NumPy 2.4 refuses."""
    import numpy as np
    import triton

    versions = [tuple(map(int, version.split(".")[:2])) for version in (triton.__version__, np.__version__)]
    return versions[0] >= (3, 7) or versions[1] < (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or not HAS_TRITON or "TRITON_INTERPRET" in os.environ, reason="needs Triton alone")
def test_all_by_the_interpreter():
    """In a process of its own: Triton has to be imported for it."""
    if not interpreter_works():
        pytest.skip("the interpreter of Triton 3.6 needs NumPy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def stored(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values, with the dimensions stored in ``order``."""
    back = [order.index(dimension) for dimension in range(len(order))]
    return values.permute(order).contiguous().permute(back)


def draw(layers, dtype):
    torch.manual_seed(0)
    weights = [stored(torch.randn(shape, device=DEVICE).to(dtype), order) for shape, order, _ in layers]
    lefts = [torch.randn(len(weight), r, device=DEVICE) for weight, (_, _, r) in zip(weights, layers, strict=True)]
    sizes = [(left.shape[1], weight[0].numel()) for weight, left in zip(weights, lefts, strict=True)]
    return weights, lefts, [torch.randn(size, device=DEVICE) for size in sizes]


def whole(weights: list[torch.Tensor]) -> list[Block]:
    """All rows of each weight."""
    return [Block(i, 0, len(weight)) for i, weight in enumerate(weights)]


def assert_near(value: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to ``dtype`` of a sum in fp32."""
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert value.shape == exact.shape
    assert float((value.double() - exact).abs().max()) <= step * float(exact.abs().max())


@kernels
@pytest.mark.parametrize("layers", [LAYERS, PLAIN], ids=["any", "plain"])
@pytest.mark.parametrize(("dtype", "result"), [(HALF, HALF), (torch.float32, HALF), (torch.float32, torch.float32)])
def test_sums(layers, dtype, result):
    weights, lefts, rights = draw(layers, dtype)
    sums = SumPlan(weights, whole(weights), lefts, rights).sums(SCALE, result)
    for total, weight, left, right in zip(sums, weights, lefts, rights, strict=True):
        assert (total.stride(), total.dtype) == (weight.stride(), result)
        delta = SCALE * (left.double() @ right.double())
        assert_near(total, weight.double() + delta.view(weight.shape), result)


@kernels
def test_a_plan_reads_the_values_of_now():
    weights, lefts, rights = draw(LAYERS, torch.float32)
    plan = SumPlan(weights, whole(weights), lefts, rights)
    plan.sums(SCALE, torch.float32)
    for tensor in (*weights, *lefts, *rights):
        tensor.normal_()
    for total, weight, left, right in zip(plan.sums(SCALE, torch.float32), weights, lefts, rights, strict=True):
        assert_near(total, weight.double() + SCALE * (left.double() @ right.double()).view(weight.shape), total.dtype)


@kernels
@pytest.mark.parametrize("layers", [LAYERS, PLAIN], ids=["any", "plain"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_sums_with_b_zero_are_the_weights_bit_for_bit(layers, dtype):
    weights, lefts, rights = draw(layers, dtype)
    weights[0].fill_(-0.0)
    for left in lefts:
        left.zero_()
    for total, weight in zip(SumPlan(weights, whole(weights), lefts, rights).sums(SCALE, dtype), weights, strict=True):
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(total.view(bits), weight.view(bits))


def gradients_like(weights: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    """Gradients with the strides of the weights, contiguous ones, or others."""
    like = [torch.randn_like(weight) for weight in weights]
    if layout == "contiguous":
        return [gradient.contiguous() for gradient in like]
    if layout == "expanded":
        return [torch.ones((), dtype=weight.dtype, device=DEVICE).expand(weight.shape) for weight in weights]
    return like


@kernels
@pytest.mark.parametrize("layers", [LAYERS, PLAIN], ids=["any", "plain"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("layout", ["same", "contiguous", "expanded"])
def test_gradients(layers, dtype, layout):
    weights, lefts, rights = draw(layers, dtype)
    gradients = gradients_like(weights, layout)
    d_lefts, d_rights = SumPlan(weights, whole(weights), lefts, rights).gradients(gradients, lefts, rights, SCALE)
    for d_left, d_right, gradient, left, right in zip(d_lefts, d_rights, gradients, lefts, rights, strict=True):
        matrix = SCALE * gradient.double().reshape(len(left), -1)
        assert d_left.is_contiguous() and d_right.is_contiguous()
        assert_near(d_left, matrix @ right.to(dtype).double().T, torch.float32)
        assert_near(d_right, left.to(dtype).double().T @ matrix, torch.float32)


@kernels
def test_gradients_of_other_factors_than_those_of_the_plan():
    weights, lefts, rights = draw(LAYERS, torch.float32)
    others = [[torch.empty_like(factor) for factor in factors] for factors in (lefts, rights)]
    plan = SumPlan(weights, whole(weights), *others)
    d_lefts, d_rights = plan.gradients(weights, lefts, rights, 1.0)
    for d_left, d_right, weight, left, right in zip(d_lefts, d_rights, weights, lefts, rights, strict=True):
        matrix = weight.double().reshape(len(left), -1)
        assert_near(d_left, matrix @ right.double().T, torch.float32)
        assert_near(d_right, left.double().T @ matrix, torch.float32)


ROWS = {
    "all": [(0, 16), (16, 32), (32, 48)],
    "some": [(16, 32)],
    "some, in another order": [(32, 48), (0, 16)],
    "of two sizes": [(0, 16), (16, 48)],
}


@kernels
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("columns", [16, 24], ids=["plain", "any"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_pairs_of_some_rows_of_a_weight(rows, columns, dtype):
    torch.manual_seed(0)
    weights = [torch.randn(size, columns, device=DEVICE).to(dtype) for size in (64, 48, 48)]
    blocks = [Block(0, 0, 64), *(Block(i, *edges) for i in (1, 2) for edges in rows)]
    lefts = [torch.randn(stop - start, 1 + i, device=DEVICE) for i, (_, start, stop) in enumerate(blocks)]
    rights = [torch.randn(left.shape[1], columns, device=DEVICE) for left in lefts]
    assert can_be_read(weights, blocks, lefts, rights)
    plan = SumPlan(weights, blocks, lefts, rights)
    exact = [weight.double() for weight in weights]
    for block, left, right in zip(blocks, lefts, rights, strict=True):
        block.of(exact[block.weight]).add_(left.double() @ right.double(), alpha=SCALE)
    for total, value in zip(plan.sums(SCALE, dtype), exact, strict=True):
        assert_near(total, value, dtype)
    gradients = [torch.randn_like(weight) for weight in weights]
    gradients[1] = None
    d_lefts, d_rights = plan.gradients(gradients, lefts, rights, SCALE)
    for block, d_left, d_right, left, right in zip(blocks, d_lefts, d_rights, lefts, rights, strict=True):
        if block.weight == 1:
            assert d_left is None and d_right is None
            continue
        matrix = SCALE * block.of(gradients[block.weight]).double()
        assert_near(d_left, matrix @ right.to(dtype).double().T, torch.float32)
        assert_near(d_right, left.to(dtype).double().T @ matrix, torch.float32)


def test_rows_must_begin_where_the_kernels_can_write():
    left, right = torch.ones(16, 2), torch.ones(2, 12)
    for first, can_be in ((32, True), (16, False), (0, False)):  # the rows after the block begin at 12 * 16 elements
        blocks = [Block(0, first, first + 16)]
        assert can_be_read([torch.ones(48, 12)], blocks, [left], [right]) is can_be


@kernels
def test_layers_without_a_gradient():
    weights, lefts, rights = draw(LAYERS, HALF)
    plan = SumPlan(weights, whole(weights), lefts, rights)
    every = plan.gradients(weights, lefts, rights, SCALE)
    some = plan.gradients([None if i % 2 else weight for i, weight in enumerate(weights)], lefts, rights, SCALE)
    for of_every, of_some in zip(every, some, strict=True):
        for i, (value, other) in enumerate(zip(of_every, of_some, strict=True)):
            assert other is None if i % 2 else torch.equal(value, other)
    none = [None] * len(weights)
    assert plan.gradients(none, lefts, rights, SCALE) == (none, none)


@kernels
def test_a_plan_sees_gradients_and_factors_that_moved():
    """The plan keeps the addresses of its last gradients on the device."""
    layers = [((40, 16, 3, 3), CONV, 8), ((64, 48), LINEAR, 4)]
    weights, lefts, rights = draw(layers, HALF)
    _, other_lefts, other_rights = draw(layers, HALF)
    plan = SumPlan(weights, whole(weights), lefts, rights)
    last = stored(weights[0].detach().clone(), CHANNELS_LAST)
    same_place = last.as_strided(last.shape, weights[0].stride())  # as `last` begins, but its rows are stored otherwise
    for gradients, factors in (
        ([weights[0], weights[1]], (lefts, rights)),
        ([weights[0], weights[1]], (lefts, rights)),
        ([last, weights[1]], (lefts, rights)),
        ([same_place, weights[1]], (lefts, rights)),
        ([same_place, None], (lefts, rights)),
        ([same_place, weights[1]], (other_lefts, rights)),
        ([same_place, weights[1]], (other_lefts, other_rights)),
        ([same_place.float(), weights[1].float()], (other_lefts, other_rights)),
    ):
        expected = SumPlan(weights, whole(weights), lefts, rights).gradients(gradients, *factors, SCALE)
        for value, right in zip(plan.gradients(gradients, *factors, SCALE), expected, strict=True):
            for tensor, other in zip(value, right, strict=True):
                assert tensor is other is None or torch.equal(tensor, other)


@pytest.mark.parametrize(
    ("shape", "order", "inner"),
    [
        ((4, 6), LINEAR, 6),
        ((4, 6), (1, 0), 0),
        ((4, 6, 3, 3), CHANNELS_LAST, 6),
        ((4, 6, 3, 3), CONV, 54),
        ((4, 1, 3, 3), CHANNELS_LAST, 9),
        ((1, 6, 3, 3), CHANNELS_LAST, 6),
        ((4, 6, 1, 1), CHANNELS_LAST, 6),
        ((4, 6, 2, 3), (0, 3, 1, 2), 12),
        ((4, 6, 2, 3), (0, 1, 3, 2), 0),
        ((4, 6, 2, 3), (1, 0, 2, 3), 0),
    ],
)
def test_the_inner_size_gives_the_column_of_each_stored_element(shape, order, inner):
    weight = stored(torch.arange(float(torch.Size(shape).numel())).view(shape), order)
    assert inner_size(weight) == inner
    if inner:
        columns = weight[0].numel()
        expected = [stored_at % inner * (columns // inner) + stored_at // inner for stored_at in range(columns)]
        assert weight.permute(order).flatten()[:columns].tolist() == expected


@pytest.mark.parametrize(
    ("weight", "left", "right"),
    [
        (torch.ones(4, 6, dtype=torch.float64), torch.ones(4, 2), torch.ones(2, 6)),
        (torch.ones(4, 12)[:, ::2], torch.ones(4, 2), torch.ones(2, 6)),
        (torch.ones(1, 6).expand(4, 6), torch.ones(4, 2), torch.ones(2, 6)),
        (torch.ones(4, 6), torch.ones(4, 2, dtype=torch.bfloat16), torch.ones(2, 6)),
        (torch.ones(4, 6), torch.ones(2, 4).T, torch.ones(2, 6)),
        (torch.ones(4, 6), torch.ones(4, 129), torch.ones(129, 6)),
        (torch.ones(4, 6, device="meta"), torch.ones(4, 2), torch.ones(2, 6)),
        (torch.ones(0, 6), torch.ones(0, 2), torch.ones(2, 6)),
        (torch.ones(4, 6), torch.ones(4, 3), torch.ones(2, 6)),
        (torch.ones(4, 6), torch.ones(4, 2), torch.ones(2, 5)),
        (torch.ones(4, 6), torch.ones(4, 2), torch.ones(2, 6, 1)),
    ],
)
def test_what_the_kernels_cannot_read(weight, left, right):
    other = torch.ones(4, 6), torch.ones(4, 2), torch.ones(2, 6)
    assert can_be_read([other[0]], whole(other[:1]), [other[1]], [other[2]])
    assert not can_be_read([weight], whole([weight]), [left], [right])
    assert not can_be_read([other[0], weight], whole([other[0], weight]), [other[1], left], [other[2], right])


def test_no_plan_on_the_cpu():
    assert not SumPlan.can_be_used([torch.ones(4, 6)], [Block(0, 0, 4)], [torch.ones(4, 2)], [torch.ones(2, 6)])
