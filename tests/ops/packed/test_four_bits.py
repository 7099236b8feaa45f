"""The matrix of a weight in four bits: each code's number times the largest absolute value of its block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_lora.ops.packed import four_bits
from lightning_lora.ops.packed.four_bits import FourBits, dequantize_4bit, rows_by_torch
from tests.helpers.selection import slow_except

functional = pytest.importorskip("bitsandbytes").functional


def written_out(codes, state, dtype):
    largest, count = state.absmax, state.shape.numel()
    if state.nested:
        of_blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(largest)]
        largest = state.state2.code[largest.int()] * of_blocks + state.offset
    codes = codes.view(torch.uint8)
    both = torch.stack([codes >> 4, codes & 15], -1).flatten()[:count]
    numbers = state.code[both.int()] * largest.repeat_interleave(state.blocksize)[:count]
    return numbers.view(state.shape).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (5, 77), (300, 192)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("blocksize", "nested"), [(64, True), (64, False), (128, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_matrix_is_rounded_once(rows, columns, quant_type, blocksize, nested, dtype):
    torch.manual_seed(0)
    settings = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    codes, state = functional.quantize_4bit(torch.randn(rows, columns), **settings)
    matrix = dequantize_4bit(FourBits.of(codes, state), dtype)
    if dtype == torch.bfloat16:  # a CPU of 16-bit instructions rounds as it likes
        torch.testing.assert_close(matrix, written_out(codes, state, dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(matrix, written_out(codes, state, dtype))


# bitsandbytes compiles its own function for an odd width.
@pytest.mark.parametrize(("rows", "columns"), slow_except([(96, 64), (300, 192)], [(96, 64), (5, 77), (300, 192)]))
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)])
def test_some_rows_by_torch_alone_have_the_same_bits(rows, columns, quant_type, nested):
    """Of an odd width a row begins within a byte and within a block."""
    torch.manual_seed(0)
    codes, state = functional.quantize_4bit(
        torch.randn(rows, columns), blocksize=64, quant_type=quant_type, compress_statistics=nested
    )
    weight = FourBits.of(codes.view(-1), state)
    matrix = dequantize_4bit(weight, torch.float32)
    for part in (slice(0, rows), slice(1, 3), slice(rows - 2, rows)):
        assert torch.equal(rows_by_torch(weight, part), matrix[part])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_another_dtype(storage):
    """As FSDP needs it."""
    codes, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", quant_storage=storage)
    assert codes.dtype == storage
    assert torch.equal(
        dequantize_4bit(FourBits.of(codes, state), torch.float32), written_out(codes, state, torch.float32)
    )


class OnGPU:
    """Stands for codes on the GPU 1."""

    is_cuda = True

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize(("current", "supported", "by_kernel"), [(1, True, True), (0, True, False), (1, False, False)])
def test_the_kernel_is_launched_on_the_current_gpu_alone(monkeypatch, current, supported, by_kernel):
    """Triton would launch it on another GPU than that of the weight, as where a model is spread over several."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(four_bits, "supports_kernels", lambda device: supported)
    monkeypatch.setattr(four_bits, "by_the_library", lambda weight, dtype: "library")
    kernels = SimpleNamespace(dequantize=lambda *arguments: "kernel")
    monkeypatch.setattr("lightning_lora.ops.packed.four_bit_kernels", kernels, raising=False)
    weight = FourBits(OnGPU(), None, None, "nf4", 64, (2, 2), None)
    assert dequantize_4bit(weight, torch.bfloat16) == ("kernel" if by_kernel else "library")
