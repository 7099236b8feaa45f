"""LoRA for ``nn.MultiheadAttention``: query, key and value have separate pairs, though torch stores one parameter.

The forward of torch reads the weights and calls no layer. On the activations' side attention is therefore written out,
and each low-rank term is added to its projection. On the weight's side torch's own function computes with the sums, and
for inference the original forward runs on merged weights.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.layers.attention_formula import (
    PROJECTIONS,
    attention,
    base_projections,
    output_projection,
    sequence_first,
)
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.merged_forward import (
    call_on_merged_weights,
    can_use_merged_weights,
    has_active_adapters,
)
from lightning_lora.layers.mixed.terms import add_terms, of_part
from lightning_lora.layers.sums.reading import summed_weight, summed_weights
from lightning_lora.layers.weight_view import Rows, WeightPart
from lightning_lora.torch_internals import has_module_hooks


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
        inputs = (query, key, value)
        arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        grad = torch.is_grad_enabled() and not query.is_nested
        sums = summed_weights(self, query) if grad else {}
        output_weight = _output_weight(self, query) if sums else None
        if output_weight is not None:
            return _attention_by_torch(self, inputs, sums, output_weight, *arguments)
        if not has_active_adapters(self):
            return super().forward(query, key, value, *arguments)
        if can_use_merged_weights(self, query) or query.is_nested:
            return call_on_merged_weights(self, super().forward, query, key, value, *arguments)
        sums = sums if grad else summed_weights(self, query)
        return attention(self, inputs, *arguments, project=partial(_project, self, sums), project_out=_project_out)


def _attention_by_torch(
    layer: LoRAMultiheadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    sums: dict[str, Tensor],
    output_weight: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the plain layer gives where gradients are enabled, with ``sums`` and ``output_weight`` for its weights."""
    is_batch_first, parameters = layer.batch_first and inputs[0].dim() == 3, layer._parameters | sums
    query, key, value = sequence_first(layer, *inputs) if is_batch_first else inputs
    output, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        parameters["in_proj_weight"],
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        output_weight,
        layer.out_proj.bias,
        layer.training,
        key_padding_mask,
        need_weights,
        attn_mask,
        not layer._qkv_same_embed_dim,
        **{name: parameters[name] for name in PROJECTIONS},
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return output.transpose(0, 1) if is_batch_first else output, weights


def _output_weight(layer: nn.MultiheadAttention, query: Tensor) -> Tensor | None:
    """The weight of ``out_proj`` with its adapters; ``None`` where that layer must be called."""
    projection: nn.Module = layer.out_proj
    if torch.compiler.is_compiling() or has_module_hooks(projection) or "forward" in vars(projection):
        return None
    if isinstance(projection, LoRALayer) and projection.lora.active_pairs():
        return summed_weight(projection, query)
    is_plain = getattr(projection, "original_class", type(projection)) is NonDynamicallyQuantizableLinear
    return projection._parameters["weight"] if is_plain else None


def _project(
    layer: LoRAMultiheadAttention, sums: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, ``(length, batch, embed_dim)``: base output plus low-rank terms, or that of the sums."""
    q, k, v = base_projections(layer, query, key, value, sums or layer._parameters)
    if sums:
        return q, k, v
    return _add_pairs(layer, "q", q, query), _add_pairs(layer, "k", k, key), _add_pairs(layer, "v", v, value)


def _add_pairs(layer: LoRAMultiheadAttention, name: str, y: Tensor, x: Tensor) -> Tensor:
    """The base output ``y`` plus the low-rank term for ``x`` of each pair of the projection ``name``."""
    return add_terms(y, of_part(layer.lora.terms(x, dim=1), name), [x])


def _project_out(layer: nn.MultiheadAttention, heads: Tensor) -> Tensor:
    """``out_proj`` of the heads' outputs, ``(length, batch, embed_dim)``: to choose by sample, the batch is first."""
    projection: nn.Module = layer.out_proj
    if isinstance(projection, LoRALayer) and projection.lora.has_samples():
        output: Tensor = projection(heads.transpose(0, 1)).transpose(0, 1)
        return output
    return output_projection(layer, heads)
