"""Sums and gradients of weights of one shape, against the formula written out in fp64."""

import pytest
import torch

from lightning_lora.ops.sums.batch import WeightBatch, is_dense, stored_order

SCALE = 1.5


def made(shape, memory_format=torch.contiguous_format, n=3, r=2):
    columns = torch.Size(shape[1:]).numel()
    weights = [torch.randn(shape, dtype=torch.double).to(memory_format=memory_format) for _ in range(n)]
    lefts = [torch.randn(shape[0], r, dtype=torch.double) for _ in range(n)]
    return weights, lefts, [torch.randn(r, columns, dtype=torch.double) for _ in range(n)]


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4, 3), torch.contiguous_format),
        ((4, 3, 5), torch.contiguous_format),
        ((4, 3, 2, 5), torch.contiguous_format),
        ((4, 3, 2, 5), torch.channels_last),
        ((4, 3, 1, 1), torch.channels_last),
        ((4, 3, 2, 5, 2), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("used", [[0, 1, 2], [1]])
def test_sums_and_gradients_are_the_formula(shape, memory_format, used):
    weights, lefts, rights = made(shape, memory_format)
    batch = WeightBatch(weights, lefts, rights, SCALE)
    gradients = [torch.randn(shape, dtype=torch.double).to(memory_format=memory_format) for _ in used]
    d_left, d_right = batch.gradients(used, gradients, torch.double)
    for weight, left, right, total in zip(weights, lefts, rights, batch.sums(), strict=True):
        torch.testing.assert_close(total, weight + SCALE * (left @ right).view(shape))
        assert total.stride() == weight.stride()
    for position, i in enumerate(used):
        matrix = gradients[position].flatten(1)
        torch.testing.assert_close(d_left[position], SCALE * matrix @ rights[i].T)
        torch.testing.assert_close(d_right[position], SCALE * lefts[i].T @ matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_zeros_in_b_the_sums_are_the_weights(dtype):
    weights, lefts, rights = made((8, 6))
    weights = [weight.to(dtype) for weight in weights]
    batch = WeightBatch(weights, [torch.zeros_like(left).float() for left in lefts], [A.float() for A in rights], SCALE)
    assert all(torch.equal(total, weight) for total, weight in zip(batch.sums(), weights, strict=True))


def test_gradients_have_the_dtype_of_the_factors():
    weights, lefts, rights = ([tensor.bfloat16() for tensor in tensors] for tensors in made((8, 6)))
    batch = WeightBatch(weights, [B.float() for B in lefts], [A.float() for A in rights], 1.0)
    d_left, d_right = batch.gradients([0], [torch.randn(8, 6).bfloat16()], torch.float32)
    assert (d_left.dtype, d_right.dtype) == (torch.float32, torch.float32)


def test_what_is_dense():
    weight = torch.empty(4, 3, 2, 2)
    assert is_dense(weight) and is_dense(weight.to(memory_format=torch.channels_last))
    assert not is_dense(weight[:, :2]) and not is_dense(torch.empty(3, 4).T)
    assert stored_order(weight) == (0, 1, 2, 3)
