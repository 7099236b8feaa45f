"""LoRA for ``nn.MultiheadAttention``: query, key and value have separate pairs, though torch stores one parameter.

The forward of torch reads the weights and calls no layer. So attention is written out, and each low-rank term is added
to its projection.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from lightning_lora.layers.attention_formula import attention, base_projections, output_projection
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LinearAdapter
from lightning_lora.layers.merged_forward import (
    call_on_merged_weights,
    can_use_merged_weights,
    has_active_adapters,
)
from lightning_lora.layers.mixed.terms import add_terms, of_part
from lightning_lora.layers.summed_weight import summed_weight
from lightning_lora.layers.weight_view import Rows, WeightPart


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
        inputs = (query, key, value)
        return attention(self, inputs, *arguments, project=partial(_project, self), project_out=_project_out)


def _project(layer: LoRAMultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, ``(length, batch, embed_dim)``: base output plus low-rank terms."""
    summed = _summed_weights(layer, query)
    q, k, v = base_projections(layer, query, key, value, summed or layer._parameters)
    if summed:
        return q, k, v
    return _add_pairs(layer, "q", q, query), _add_pairs(layer, "k", k, key), _add_pairs(layer, "v", v, value)


def _summed_weights(layer: LoRAMultiheadAttention, query: Tensor) -> dict[str, Tensor]:
    """The sums of the weights and their adapters by name, or none at all on the side of the activations."""
    sums = {key: summed_weight(layer, query, key) for key in layer.lora.by_weight()}
    return {key: total for key, total in sums.items() if total is not None} if None not in sums.values() else {}


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
