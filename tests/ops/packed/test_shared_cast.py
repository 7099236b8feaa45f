"""Layers that share an input share the memory of its copy in another dtype, and nothing else."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.ops.packed import shared_cast as file
from lightning_lora.ops.packed.shared_cast import shared_cast


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 6, requires_grad=True)


def test_copies_share_their_memory_while_one_of_them_lives(x):
    first, second = shared_cast(x, torch.bfloat16), shared_cast(x, torch.bfloat16)
    assert first is not second and first.data_ptr() == second.data_ptr()
    assert torch.equal(second, x.bfloat16())
    del first
    assert shared_cast(x, torch.bfloat16).data_ptr() == second.data_ptr()
    del second
    assert file._last[2]() is None


def test_a_copy_that_only_autograd_keeps_is_found(x):
    y = shared_cast(x, torch.float64).square()  # saves its input
    (saved,) = [y.grad_fn._saved_self]
    assert shared_cast(x, torch.float64).data_ptr() == saved.data_ptr()


def test_gradients_are_summed_in_the_dtype_of_the_input(x):
    """Summed in bf16, 1 and 2 ** -9 are 1."""
    total = shared_cast(x, torch.bfloat16).sum() + 2**-9 * shared_cast(x, torch.bfloat16).sum()
    total.backward()
    assert torch.equal(x.grad, torch.full_like(x, 1 + 2**-9))


def test_the_second_derivative(x):
    y = shared_cast(x, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: shared_cast(x, torch.float32).double() ** 2, y.detach().requires_grad_(), eps=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("change", ["written", "another", "dtype"])
def test_what_changed_is_cast_anew(x, change):
    first = shared_cast(x, torch.bfloat16)
    dtype = torch.float16 if change == "dtype" else torch.bfloat16
    if change == "written":
        x.data  # noqa: B018 - reading is no write
        with torch.no_grad():
            x.add_(1)
    source = x.detach().clone() if change == "another" else x
    second = shared_cast(source, dtype)
    assert second.data_ptr() != first.data_ptr() and torch.equal(second, source.to(dtype))


def test_nothing_is_cast_or_kept_where_it_need_not_be(x):
    assert shared_cast(x, torch.float32) is x
    before = file._last
    with torch.no_grad():
        assert torch.equal(shared_cast(x, torch.bfloat16), x.bfloat16())
    with torch.inference_mode():
        y = torch.ones(3)
        shared_cast(y, torch.bfloat16)
    assert file._last is before
    assert shared_cast(y, torch.bfloat16).data_ptr() != shared_cast(y, torch.bfloat16).data_ptr()
