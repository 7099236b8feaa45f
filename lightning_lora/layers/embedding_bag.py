"""LoRA for ``nn.EmbeddingBag``: a bag's sum or mean of rows, and so of the rows of A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.embedding import LoRALookup
from lightning_lora.layers.merged_forward import sum_of


class EmbeddingBagAdapter(Adapter):
    """Adds ``scale * B`` times the bag of the columns of A."""

    def forward(self, y: Tensor, layer: LoRAEmbeddingBag, index: Tensor, offsets: Any, weights: Any) -> Tensor:
        """The bags ``y`` of shape ``(bags, embedding_dim)`` with their terms; the padding index has none."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        weights = None if weights is None else weights.to(dtype)
        hidden = bags(layer, self.A.t().to(dtype), index, offsets, weights)  # (bags, r)
        return y + F.linear(hidden.to(y.dtype), (self.scale * self.B).to(y.dtype))


class LoRAEmbeddingBag(LoRALookup, nn.EmbeddingBag):
    """An ``nn.EmbeddingBag`` with adapters; A is ``(r, num_embeddings)``, B ``(embedding_dim, r)``.

    The largest of rows is no sum of anything, nor are rows cut to ``max_norm``: with these the whole sum is built.
    """

    lora_original_class = nn.EmbeddingBag
    lora_adapter_class = EmbeddingBagAdapter

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """The frozen bags, then each adapter's term."""
        if self.max_norm is not None or (self.mode == "max" and self.lora.active()):
            total = sum_of(self, "weight") if self.lora.active() else self.weight.clone()  # torch cuts rows in place
            return bags(self, total, input, offsets, per_sample_weights, self.max_norm)
        y = super().forward(input, offsets, per_sample_weights)
        for adapter in self.lora.active():
            y = adapter(y, self, input, offsets, per_sample_weights)
        return y


def bags(
    layer: LoRAEmbeddingBag, weight: Tensor, index: Tensor, offsets: Any, weights: Any, max_norm: float | None = None
) -> Tensor:
    """The bags of the rows of ``weight``, whose gradient is dense, as ``layer`` makes them."""
    return F.embedding_bag(
        index,
        weight,
        offsets,
        max_norm=max_norm,
        norm_type=layer.norm_type,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        mode=layer.mode,
        per_sample_weights=weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )
