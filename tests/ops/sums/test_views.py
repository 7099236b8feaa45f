"""Many tensors in one allocation: their values, strides, places, and that none overlap."""

from __future__ import annotations

import torch

from lightning_lora.ops.sums.views import ALIGNMENT, Views

LIKE = [
    torch.empty(3, 5),
    torch.empty(4, 2, 3, 3).to(memory_format=torch.channels_last),
    torch.empty(5, 3).mT,
    torch.empty(3, 5),
    torch.empty(1),
    torch.empty(4, 2, 3, 3),
    torch.empty(16, 16),
]


def test_each_view_has_its_shape_strides_and_place():
    views = Views(LIKE)
    memory = torch.arange(float(views.size))
    for view, tensor, offset in zip(views.of(memory), LIKE, views.offsets, strict=True):
        assert (view.shape, view.stride(), view.storage_offset()) == (tensor.shape, tensor.stride(), offset)
        assert offset % ALIGNMENT == 0
        assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_no_two_views_share_an_element():
    views = Views(LIKE)
    memory = torch.zeros(views.size)
    for number, view in enumerate(views.of(memory)):
        view += 1
        assert (view == 1).all(), number
    assert memory.sum() == sum(tensor.numel() for tensor in LIKE)
