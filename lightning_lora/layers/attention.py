"""LoRA for ``nn.MultiheadAttention``: query, key and value have separate pairs, though torch stores one parameter.

The forward of torch reads the weights and calls no layer. So attention is written out here (Vaswani et al. 2017,
equation 1), in torch's order of operations, and each low-rank term is added to its projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.merged_forward import (
    call_on_merged_weights,
    can_use_merged_weights,
    has_active_adapters,
)
from lightning_lora.layers.summed_weight import summed_weight
from lightning_lora.layers.weight_view import Rows, WeightPart
from lightning_lora.ops.linear import base_linear

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with adapters on q, k and v; ``out_proj`` is a linear layer with its own adapter."""

    original_class = nn.MultiheadAttention
    lora_adapter_class = LinearAdapter

    @classmethod
    def lora_parts(cls, module: nn.Module) -> list[WeightPart]:
        """The projections of query, key and value: each a third of one parameter, or a separate parameter."""
        assert isinstance(module, nn.MultiheadAttention)
        if not module._qkv_same_embed_dim:
            return [WeightPart(f"{name}_proj_weight", name) for name in "qkv"]
        size = int(module.embed_dim)
        return [WeightPart("in_proj_weight", name, Rows(i * size, (i + 1) * size)) for i, name in enumerate("qkv")]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain layer: the output, of the shape of ``query``, and the attention weights if they are needed."""
        arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not has_active_adapters(self):
            return super().forward(query, key, value, *arguments)
        if can_use_merged_weights(self, query) or query.is_nested:
            return call_on_merged_weights(self, super().forward, query, key, value, *arguments)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "`attn_mask` must be given with `is_causal=True`, which is a hint about it, but got None."
            )
        batched = query.dim() == 3
        query, key, value = _sequence_first(self, query, key, value)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(self, query, key, key_padding_mask, attn_mask)
        q, k, v = _extended(self, *_project(self, query, key, value))
        if need_weights:
            heads, weights = _weighted(self, q, k, v, mask)
        else:
            heads, weights = _attend(self, q, k, v, mask, causal), None
        output = self.out_proj(heads.reshape(-1, self.embed_dim)).view(query.shape)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights


def _sequence_first(layer: LoRAMultiheadAttention, *inputs: Tensor) -> list[Tensor]:
    """The inputs as ``(length, batch, features)``; equal objects stay equal objects, as in torch."""
    if inputs[0].dim() == 2:
        return [x.unsqueeze(1) for x in inputs]
    transposed = {id(x): x.transpose(0, 1) if layer.batch_first else x for x in inputs}
    return [transposed[id(x)] for x in inputs]


def _mask(
    layer: LoRAMultiheadAttention, query: Tensor, key: Tensor, padding: Tensor | None, attention: Tensor | None
) -> Tensor | None:
    """The mask that is added to the scores, ``(1 or batch * heads, 1 or targets, sources)``."""
    (targets, batch, _), sources = query.shape, len(key)
    masks = []
    if attention is not None:
        _check("attn_mask", attention, (targets, sources), (batch * layer.num_heads, targets, sources))
        attention = attention if attention.dim() == 3 else attention.unsqueeze(0)
        masks.append(_additive("attn_mask", attention, query.dtype))
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        _check("key_padding_mask", padding, (batch, sources))
        masks.append(
            _additive("key_padding_mask", padding, query.dtype).repeat_interleave(layer.num_heads, 0).unsqueeze(1)
        )
    extra_keys = (layer.bias_k is not None) + layer.add_zero_attn
    return F.pad(sum(masks[1:], masks[0]), (0, extra_keys)) if masks else None


def _project(layer: LoRAMultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, ``(length, batch, embed_dim)``: base output plus low-rank terms."""
    summed = _summed_weights(layer, query)
    q, k, v = _base_projections(layer, query, key, value, summed or layer._parameters)
    if summed:
        return q, k, v
    return _add_pairs(layer, "q", q, query), _add_pairs(layer, "k", k, key), _add_pairs(layer, "v", v, value)


def _summed_weights(layer: LoRAMultiheadAttention, query: Tensor) -> dict[str, Tensor]:
    """The sums of the weights and their adapters by name, or none at all on the side of the activations."""
    sums = {key: summed_weight(layer, query, key) for key in layer.lora.by_weight()}
    return {key: total for key, total in sums.items() if total is not None} if None not in sums.values() else {}


def _base_projections(
    layer: LoRAMultiheadAttention, query: Tensor, key: Tensor, value: Tensor, parameters: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """The base outputs, by the same products as torch computes: others would differ in the last bits.

    Args:
        layer: whose projections they are.
        query: ``(length, batch, embed_dim)``, as the next two.
        key: input of the keys.
        value: input of the values.
        parameters: the weights by name.
    """
    bias = layer.in_proj_bias
    if not layer._qkv_same_embed_dim:
        weights = [parameters.get(name, getattr(layer, name)) for name in PROJECTIONS]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(base_linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
    thirds = [3] if query is key is value else [1, 2] if key is value else [1, 1, 1]
    size = int(layer.embed_dim)  # torch splits by no number of NumPy's
    sizes = [count * size for count in thirds]
    split_weight = torch.split(parameters["in_proj_weight"], sizes)
    split_bias = (None,) * len(sizes) if bias is None else torch.split(bias, sizes)
    inputs = (query, key, value)[: len(sizes)]
    outputs = [base_linear(*each) for each in zip(inputs, split_weight, split_bias, strict=True)]
    return tuple(part.contiguous() for y in outputs for part in torch.split(y, size, -1))


def _add_pairs(layer: LoRAMultiheadAttention, name: str, y: Tensor, x: Tensor) -> Tensor:
    """The base output ``y`` plus the low-rank term for ``x`` of each pair of the projection ``name``."""
    for adapter in layer.lora.active_pairs():
        if adapter.part.name == name:
            y = adapter(y, x)
    return y


def _extended(layer: LoRAMultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v as ``(batch * heads, length, head_dim)``, with the key and value of ``add_bias_kv`` appended."""
    batch = q.shape[1]
    if layer.bias_k is not None and layer.bias_v is not None:
        k, v = (torch.cat([x, learned.repeat(1, batch, 1)]) for x, learned in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    return [x.reshape(len(x), batch * layer.num_heads, layer.head_dim).transpose(0, 1) for x in (q, k, v)]


def _attend(
    layer: LoRAMultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim) + mask) v`` as ``(targets, batch, heads, head_dim)``."""
    q, k, v = (_by_head(layer, x) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if len(mask) == 1 else _by_head(layer, mask)
    dropout = layer.dropout if layer.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).permute(2, 0, 1, 3)


def _weighted(
    layer: LoRAMultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`_attend`, step by step, and the attention weights ``(batch, heads, targets, sources)``."""
    q = q * math.sqrt(1 / layer.head_dim)
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = F.dropout(scores.softmax(-1), layer.dropout, layer.training)
    output = torch.bmm(weights, v).transpose(0, 1)  # (targets, batch * heads, head_dim)
    return output, _by_head(layer, weights)


def _by_head(layer: LoRAMultiheadAttention, x: Tensor) -> Tensor:
    """``(batch * heads, ...)`` as ``(batch, heads, ...)``."""
    return x.view(len(x) // layer.num_heads, layer.num_heads, *x.shape[1:])


def _additive(argument: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as a tensor to add to the scores: -inf where a boolean mask is True."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"`{argument}` must be boolean or floating point, but got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _check(argument: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise RuntimeError(f"`{argument}` must have shape {expected}, but got {tuple(mask.shape)}.")
