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
    assert "40 passed" in done.stdout


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
@pytest.mark.parametrize(("n", "width", "r"), [*SIZES, (1, 1, 1), (64, 512, 32)])
def test_a_gradient_through_dropout_and_a(n, width, r):
    from lightning_lora.ops import dropout_kernels

    torch.manual_seed(0)
    back, A, mask = draw(n, r), draw(r, width), torch.rand(n, width, device=DEVICE) > 0.3
    found = dropout_kernels.undropped_product(back, A, mask, 1 / 0.7)
    assert_near(found, back.double() @ A.double() * mask / 0.7)
    assert (found[~mask] == 0).all()


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
@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (5, 77), (130, 192)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_the_matrix_of_a_weight_in_four_bits(rows, columns, quant_type, blocksize, nested):
    """To the bit: bitsandbytes rounds every product and every sum to fp32."""
    functional = pytest.importorskip("bitsandbytes").functional
    from lightning_lora.ops.packed import four_bit_kernels as kernels

    torch.manual_seed(0)
    weight = torch.randn(rows, columns, device=DEVICE)
    settings = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    codes, state = functional.quantize_4bit(weight, **settings)
    inner = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if nested else None
    found = kernels.dequantize(codes, state.absmax, state.code, blocksize, (rows, columns), inner, HALF)
    largest = state.absmax
    if nested:
        of_blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(largest)]
        largest = state.state2.code[largest.int()] * of_blocks + state.offset
    both = torch.stack([codes >> 4, codes & 15], -1).flatten()[: weight.numel()]
    numbers = state.code[both.int()] * largest.repeat_interleave(blocksize)[: weight.numel()]
    assert torch.equal(found, numbers.view(rows, columns).to(HALF))
