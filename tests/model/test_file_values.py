"""Values from files: which can be copied into a model."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.model.file_values import check_finite, check_value

OWN = torch.zeros(2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_real_dtype_is_a_cast(dtype):
    value = torch.ones(2, 3, dtype=dtype)
    check_value("a", value, OWN)
    check_finite("a", value, OWN)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3, 2), r"`a` has shape \(3, 2\) in the file and \(2, 3\) in the model"),
        (torch.ones(2, 3, dtype=torch.int64), r"is of torch.int64 in the file and of torch.float32 in the model"),
        (torch.ones(2, 3, dtype=torch.complex64), r"is of torch.complex64 in the file"),
        (torch.ones(2, 3).to_sparse(), "is a sparse, quantized or empty tensor"),
        (torch.ones(2, 3, device="meta"), "is a sparse, quantized or empty tensor"),
    ],
)
def test_what_cannot_be_copied_is_said(value, words):
    with pytest.raises(ValueError, match=words):
        check_value("a", value, OWN)


def test_integers_stay_integers():
    count = torch.tensor(3)
    check_value("steps", count, torch.tensor(0))
    check_finite("steps", count, torch.tensor(0))
    with pytest.raises(ValueError, match=r"of torch.float32 in the file and of torch.int64 in the model"):
        check_value("steps", torch.tensor(3.0), torch.tensor(0))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_of_a_training_that_diverged_are_refused(number):
    with pytest.raises(ValueError, match="holds NaN or infinity: the training that wrote it diverged"):
        check_finite("a", torch.full((2, 3), number), OWN)


def test_numbers_that_the_model_has_no_room_for_are_refused():
    with pytest.raises(ValueError, match=r"has values that the model's torch.float16 has no room for"):
        check_finite("a", torch.full((2, 3), 1e6), OWN.half())
