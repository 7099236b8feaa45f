"""LoRA for ``nn.Embedding`` and ``nn.EmbeddingBag``.

The input of A is the one-hot vector of an index, so ``A x`` is a column of A; a bag sums or averages columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.merged_forward import merged_weight
from lightning_lora.layers.mixed.terms import MixedTerms, add_terms
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.ops.fused_embedding import can_fuse_embedding, fused_embedding
from lightning_lora.ops.linear import Coefficient, add_low_rank_term, weighed


class EmbeddingAdapter(Adapter):
    """Adds ``scale * B A[:, index]``; there is no dropout, as a one-hot input has a single nonzero element."""

    def forward(self, y: Tensor, index: Tensor, scale_grad_by_freq: bool, coefficient: Coefficient = None) -> Tensor:
        """The base output ``y``, ``(..., embedding_dim)``, plus the low-rank term for ``index``, ``(...)``.

        The gradient of A is dense, also with ``sparse=True``, as A is small. The padding index gets no gradient, as in
        the plain layer.
        """
        hidden = F.embedding(index, self.A.t(), self.padding_idx, scale_grad_by_freq=scale_grad_by_freq)  # (..., r)
        return add_low_rank_term(y, weighed(hidden.to(y.dtype), coefficient), self.B, self.scale)


class LoRALookup(LoRALayer):
    """Base of the adapted embeddings."""

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """One matrix, stored as ``(num_embeddings, embedding_dim)``."""
        return [WeightPart(transposed=True)]

    @staticmethod
    def lora_arguments(module: nn.Module) -> dict[str, Any]:
        """The padding index, which has no delta as it has no gradient."""
        return {"padding_idx": module.padding_idx}

    def lora_after_merge(self, weight: Tensor) -> bool:
        """Renormalise the rows if there is a ``max_norm``."""
        return renormalise(weight, self.max_norm, self.norm_type)  # type: ignore[arg-type]


class LoRAEmbedding(LoRALookup, nn.Embedding):
    """An ``nn.Embedding`` with adapters; A is ``(r, num_embeddings)``, B ``(embedding_dim, r)``, as in PEFT.

    With ``max_norm`` the sum is renormalised, as it will be after a merge. The plain layer changes the rows of its
    weight in place; here the frozen weight does not change.
    """

    original_class = nn.Embedding
    lora_adapter_class = EmbeddingAdapter

    def forward(self, input: Tensor) -> Tensor:
        """The base output plus the low-rank term of each adapter, renormalised."""
        adapters: Any = self._modules["lora"]  # reading attributes of a module takes longer
        choice = adapters.choice_now()
        if self.max_norm is None and (choice is None or choice.full):
            pairs = adapters.active_pairs()
            y = self.lora_fused(input, pairs[0]) if len(pairs) == 1 else None
            if y is not None:
                return y
        terms = adapters.terms(input, extra=1)
        if self.max_norm is None:
            y = super().forward(input)
        else:
            y = F.embedding(input, self.weight, self.padding_idx, sparse=self.sparse)
        y = add_terms(y, terms, [input], self.scale_grad_by_freq)
        return y if self.max_norm is None else within_norm(y, self.max_norm, self.norm_type)

    def lora_fused(self, input: Tensor, pair: Any) -> Tensor | None:
        """The sum as one node of autograd; ``None`` where that is not possible."""
        weight: Any = self._parameters.get("weight")
        operands: tuple[Tensor, Tensor] | None = pair.operands()
        if operands is None or not can_fuse_embedding(input, weight, *operands):
            return None
        return fused_embedding(input, weight, *operands, pair.scale, self.padding_idx, self.scale_grad_by_freq)


@torch.no_grad()
def renormalise(weight: Tensor, max_norm: float | None, norm_type: float) -> bool:
    """Renormalise the rows of ``weight`` in place until they no longer change; returns whether there is a ``max_norm``.

    The plain layer renormalises again at each lookup, and one application can leave a row above the norm by rounding.
    """
    if max_norm is None:
        return False
    index = torch.arange(len(weight), device=weight.device)
    for _ in range(8):
        before = weight.clone()
        torch.embedding_renorm_(weight, index, max_norm, norm_type)
        if torch.equal(before, weight):
            break
    return True


def within_norm(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """``rows`` of shape ``(..., dim)``, scaled down where their norm is above ``max_norm``.

    Gradients ignore the scaling, as in the plain layer, which renormalises outside of the graph.
    """
    flat = rows.detach().reshape(-1, rows.shape[-1]).clone()
    index = torch.arange(len(flat), device=flat.device)
    shortened = torch.embedding_renorm_(flat, index, max_norm, norm_type).view_as(rows)
    return shortened + (rows - rows.detach())


class EmbeddingBagAdapter(Adapter):
    """Adds ``scale * B h``, where ``h`` is the bag of the columns of A."""

    def forward(
        self,
        y: Tensor,
        index: Tensor,
        weights: Tensor | None,
        layer: LoRAEmbeddingBag,
        offsets: Tensor | None,
        coefficient: Coefficient = None,
    ) -> Tensor:
        """The base output ``y``, ``(bags, embedding_dim)``, plus the low-rank term; the padding index has none."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        weights = None if weights is None else weights.to(dtype)
        hidden = bags(layer, self.A.t().to(dtype), index, offsets, weights)  # (bags, r)
        return add_low_rank_term(y, weighed(hidden.to(y.dtype), coefficient), self.B, self.scale)


class LoRAEmbeddingBag(LoRALookup, nn.EmbeddingBag):
    """An ``nn.EmbeddingBag`` with adapters; A is ``(r, num_embeddings)``, B ``(embedding_dim, r)``.

    ``mode="max"`` and ``max_norm`` are not linear in the weight, so with these the merged weight is built.
    """

    original_class = nn.EmbeddingBag
    lora_adapter_class = EmbeddingBagAdapter

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """The base output plus the low-rank term of each adapter."""
        # With `max_norm` torch renormalises rows in place, so it gets a copy.
        if self.max_norm is not None or (self.mode == "max" and self.lora.active_pairs()):
            total = merged_weight(self, "weight") if self.lora.active_pairs() else self.weight.clone()
            return bags(self, total, input, offsets, per_sample_weights, self.max_norm)
        y = super().forward(input, offsets, per_sample_weights)
        terms = self.lora.terms(y)
        if isinstance(terms, MixedTerms) and input.dim() == 1:  # the indices of all bags in one row
            terms = terms.for_all_samples(y.dtype)
        return add_terms(y, terms, [input, per_sample_weights], self, offsets)


def bags(
    layer: LoRAEmbeddingBag, weight: Tensor, index: Tensor, offsets: Any, weights: Any, max_norm: float | None = None
) -> Tensor:
    """The bags of the rows of ``weight``, as ``layer`` computes them, but with a dense gradient."""
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
