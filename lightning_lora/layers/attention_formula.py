"""``nn.MultiheadAttention`` written out (Vaswani et al. 2017, equation 1), in torch's order of operations.

The forward of torch reads the weights and calls no layer, so what acts on query, key and value is added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.ops.linear import base_linear

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
Project = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
ProjectOut = Callable[[nn.MultiheadAttention, Tensor], Tensor]


def attention(
    layer: nn.MultiheadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    *,
    project: Project,
    extend: Extend | None = None,
    project_out: ProjectOut | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output of ``layer``, of the shape of the query, and the attention weights if they are needed.

    Args:
        layer: whose attention it is.
        inputs: of query, key and value, as ``layer`` takes them; so are the next five arguments.
        key_padding_mask: of the keys.
        need_weights: whether to return the weights.
        attn_mask: of queries and keys.
        average_attn_weights: over heads.
        is_causal: a hint about ``attn_mask``.
        project: gives query, key and value, each ``(length, batch, embed_dim)``, from the inputs.
        extend: puts keys and values, each ``(batch, heads, length, head_dim)``, before those that it is given. Every
            query sees them. The weights are returned without theirs.
        project_out: gives the output, ``(length, batch, embed_dim)``, from the heads' outputs; ``None``: ``out_proj``.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("`attn_mask` must be given with `is_causal=True`, which is a hint about it, but got None.")
    query, key, value = inputs
    batched = query.dim() == 3
    query, key, value = sequence_first(layer, query, key, value)
    causal = is_causal and key_padding_mask is None and not need_weights and extend is None
    mask = None if causal else _mask(layer, query, key, key_padding_mask, attn_mask)
    q, k, v = _extended(layer, *project(query, key, value))
    before = k.shape[1]
    if extend is not None:
        k, v = (x.flatten(0, 1) for x in extend(by_head(layer, k), by_head(layer, v)))
        mask = None if mask is None else F.pad(mask, (k.shape[1] - before, 0))
    if need_weights:
        heads, weights = _weighted(layer, q, k, v, mask)
        weights = weights[..., k.shape[1] - before :]
    else:
        # No mode that acts on the function of `F`, for an attention block around this one, must act on this call.
        kernel = F.scaled_dot_product_attention if extend is None else torch.ops.aten.scaled_dot_product_attention
        heads, weights = _attend(layer, q, k, v, mask, causal, kernel), None
    output = (project_out or output_projection)(layer, heads.reshape(query.shape))
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output.transpose(0, 1) if layer.batch_first else output, weights


def sequence_first(layer: nn.MultiheadAttention, *inputs: Tensor) -> list[Tensor]:
    """The inputs as ``(length, batch, features)``; equal objects stay equal objects, as in torch."""
    if inputs[0].dim() == 2:
        return [x.unsqueeze(1) for x in inputs]
    distinct = {id(x): x for x in inputs}
    transposed = {key: x.transpose(0, 1) if layer.batch_first else x for key, x in distinct.items()}
    return [transposed[id(x)] for x in inputs]


def _mask(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, padding: Tensor | None, attention: Tensor | None
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


def base_projections(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, parameters: Mapping[str, Any]
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


def output_projection(layer: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """``out_proj`` of the heads' outputs ``(length, batch, embed_dim)``, by the product that torch computes."""
    output: Tensor = layer.out_proj(heads.reshape(-1, layer.embed_dim))
    return output.view(heads.shape)


def _extended(layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v as ``(batch * heads, length, head_dim)``, with the key and value of ``add_bias_kv`` appended."""
    batch = q.shape[1]
    if layer.bias_k is not None and layer.bias_v is not None:
        k, v = (torch.cat([x, learned.repeat(1, batch, 1)]) for x, learned in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    return [x.reshape(len(x), batch * layer.num_heads, layer.head_dim).transpose(0, 1) for x in (q, k, v)]


def _attend(
    layer: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim) + mask) v`` as ``(targets, batch, heads, head_dim)``."""
    q, k, v = (by_head(layer, x) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if len(mask) == 1 else by_head(layer, mask)
    dropout = layer.dropout if layer.training else 0.0
    return kernel(q, k, v, mask, dropout, causal).permute(2, 0, 1, 3)


def _weighted(
    layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`_attend`, step by step, and the attention weights ``(batch, heads, targets, sources)``."""
    q = q * math.sqrt(1 / layer.head_dim)
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = F.dropout(scores.softmax(-1), layer.dropout, layer.training)
    output = torch.bmm(weights, v).transpose(0, 1)  # (targets, batch * heads, head_dim)
    return output, by_head(layer, weights)


def by_head(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
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
