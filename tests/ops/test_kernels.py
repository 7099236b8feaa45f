"""The Triton kernels against torch's own products, on a GPU, or by Triton's interpreter where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # what the interpreter's NumPy has
SIZES = [(100, 40, 3), (70, 264, 16), (130, 600, 20)]


direct = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_all_by_the_interpreter"
)


@pytest.mark.skipif(DEVICE == "cuda" or "TRITON_INTERPRET" in os.environ, reason="the others run by themselves")
def test_all_by_the_interpreter():
    """In a process of its own: Triton has to be imported for it."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "23 passed" in done.stdout


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(HALF)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within the rounding of the dtype of ``found``, of sums in fp32."""
    assert found.shape == wanted.shape
    step = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 1e-5
    assert float((found.double() - wanted).abs().max()) <= step * float(wanted.abs().max())


@direct
@pytest.mark.parametrize(("n", "width", "r"), SIZES)
def test_a_gradient_by_the_factors_of_an_input(n, width, r):
    from lightning_lora.ops import gated_kernels as kernels

    torch.manual_seed(0)
    one, other, back = draw(n, width), draw(n, width), draw(n, r)
    found = kernels.gated_gradient(back, one, other, 0.5, torch.float32)
    assert_near(found, 0.5 * back.double().T @ (one * other).double())


@direct
@pytest.mark.parametrize(("n", "columns", "r"), [(1, 5, 3), (200, 7, 16), (150, 1000, 20), (33, 40, 8)])
@pytest.mark.parametrize(("padding", "by_frequency"), [(-1, False), (3, True)])
def test_a_gradient_of_the_columns_of_an_embedding(n, columns, r, padding, by_frequency):
    from lightning_lora.ops import embedding_kernels

    torch.manual_seed(0)
    index, back = torch.randint(0, columns, (n,), device=DEVICE), draw(r, n).t()  # the stride that a product gives
    found = embedding_kernels.column_gradient(back, index, columns, padding, by_frequency, torch.float32)
    one_hot = torch.nn.functional.one_hot(index, columns).double()
    wanted = back.double().T @ one_hot / (one_hot.sum(0).clamp(min=1) if by_frequency else 1)
    if padding >= 0:
        wanted[:, padding] = 0
    assert_near(found, wanted)


@direct
@pytest.mark.parametrize(("n", "width", "r"), SIZES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_every_kernel_draws_the_same_mask(n, width, r, p):
    from lightning_lora.ops import dropout_kernels

    torch.manual_seed(0)
    x, down, back = draw(n, width), draw(r, width), draw(n, r)
    seed = torch.tensor([3_141_592_653_589_793], device=DEVICE)
    mask = dropout_kernels.dropout_mask(x, seed, p).double()
    share = float((mask != 0).double().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert float(mask.max()) == pytest.approx(1 / (1 - p), rel=1e-2)
    mask = (mask != 0).double() * dropout_kernels.threshold_and_factor(p)[1]
    assert_near(dropout_kernels.dropped_product(x, down, seed, p), (mask * x.double()) @ down.double().T)
    dx, dA = dropout_kernels.dropped_gradients(x, back, down, seed, p, 0.5, torch.float32)
    assert_near(dx, mask * (back.double() @ down.double()))
    assert_near(dA, 0.5 * back.double().T @ (mask * x.double()))


@direct
def test_masks_of_other_seeds_rows_and_columns_have_nothing_in_common():
    from lightning_lora.ops import dropout_kernels

    x = draw(256, 250)  # a width of which the last draw is used in part
    one, other = (dropout_kernels.dropout_mask(x, torch.tensor([s], device=DEVICE), 0.5) != 0 for s in (1, 2))
    assert abs(float((one == other).double().mean()) - 0.5) < 0.01
    assert abs(float((one[1:] == one[:-1]).double().mean()) - 0.5) < 0.01
    assert abs(float((one[:, 1:] == one[:, :-1]).double().mean()) - 0.5) < 0.01
    for lag in (8, 16, 128):
        assert abs(float((one[:, lag:] == one[:, :-lag]).double().mean()) - 0.5) < 0.015
    assert float(one.double().mean(0).std()) < 0.05 and float(one.double().mean(1).std()) < 0.05


@direct
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (3, 20, 40)])
def test_the_node_with_dropout_inside(bias, shape):
    from lightning_lora.ops import dropout_kernels
    from lightning_lora.ops.fused_dropout import fused_dropout_linear

    torch.manual_seed(0)
    width, out, r, p, scale = shape[-1], 24, 4, 0.25, 0.5
    x = draw(*shape).requires_grad_()
    weight, offset = draw(out, width), draw(out) if bias else None
    A, B = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((r, width), (out, r)))
    gradient = draw(*shape[:-1], out)
    torch.manual_seed(1)
    y = fused_dropout_linear(x, weight, offset, A, B, scale, p)
    found = torch.autograd.grad(y, (x, A, B), gradient, retain_graph=True)
    twice = torch.autograd.grad(y, (x, A, B), gradient, create_graph=True)
    torch.manual_seed(1)
    seed = torch.randint(2**62, (1,), device=DEVICE)
    mask = dropout_kernels.dropout_mask(x.detach().reshape(-1, width), seed, p)
    mask = (mask != 0).double() * dropout_kernels.threshold_and_factor(p)[1]
    wide, wide_A, wide_B = (tensor.detach().double().requires_grad_() for tensor in (x, A, B))
    mask = mask.view(shape)
    wanted = wide @ weight.double().T + scale * ((wide * mask) @ wide_A.T) @ wide_B.T
    wanted = wanted if offset is None else wanted + offset.double()
    exact = torch.autograd.grad(wanted, (wide, wide_A, wide_B), gradient.double())
    assert (found[1].dtype, found[2].dtype) == (torch.float32, torch.float32)
    for mine, again, theirs in zip((y, *found), (y, *twice), (wanted, *exact), strict=True):
        for one in (mine, again):
            assert float((one.double() - theirs).norm() / theirs.norm()) < 8 * torch.finfo(HALF).eps
    assert all(tensor.requires_grad for tensor in twice)


def philox(seed: int, counter: int, rounds: int = 7) -> list[int]:
    """Philox4x32 as its authors write it (Salmon et al. 2011, section 3.3)."""
    word = 2**32 - 1
    key = [seed & word, seed >> 32 & word]
    a, b, c, d = counter & word, counter >> 32 & word, 0, 0
    for _ in range(rounds):
        high, low = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (low >> 32) ^ b ^ key[0], low & word, (high >> 32) ^ d ^ key[1], high & word
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return [a, b, c, d]


@direct
def test_the_mask_is_that_of_philox():
    from lightning_lora.ops import dropout_kernels

    seed, p, width = 4_000_000_000_123_456_789 % 2**62, 0.3, 20
    mask = dropout_kernels.dropout_mask(draw(3, width), torch.tensor([seed], device=DEVICE), p) != 0
    threshold, _ = dropout_kernels.threshold_and_factor(p)
    for row in range(3):
        for column in range(width):
            draws = philox(seed, row * 3 + column // 8)
            inside = column % 8
            word = draws[(0, 2, 1, 3)[inside // 2]]  # as the kernel joins them
            bits = word & 0xFFFF if inside % 2 == 0 else word >> 16
            assert bool(mask[row, column]) == (bits >= threshold), (row, column)
