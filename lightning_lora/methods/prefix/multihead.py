"""A prefix in ``nn.MultiheadAttention``, whose forward calls one function of torch that no mode sees into."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightning_lora.layers.adapted import Adapted
from lightning_lora.layers.attention_formula import attention, base_projections
from lightning_lora.layers.transformer import WithoutFastPath, WithoutNestedTensors
from lightning_lora.methods.prefix.layer import Prefix, check_not_nested


class PrefixMultiheadAttention(Adapted, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` with a prefix before its keys and values."""

    method_key: ClassVar[str] = "prefix"
    prefix: Prefix

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
        """As the plain layer. The attention weights are those of the tokens; with those of the prefix they sum to 1."""
        check_not_nested(self.prefix.site, query)
        return attention(
            self,
            (query, key, value),
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            project=self._project,
            extend=self._extend,
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return base_projections(self, query, key, value, self._parameters)

    def _extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        extended: tuple[Tensor, Tensor] = self.prefix(key, value, self.num_heads)
        return extended


class PrefixEncoderLayer(WithoutFastPath):
    """An ``nn.TransformerEncoderLayer`` with a prefix in its attention."""

    method_key: ClassVar[str] = "prefix"


class PrefixEncoder(WithoutNestedTensors):
    """An ``nn.TransformerEncoder`` with prefixes in its layers."""

    method_key: ClassVar[str] = "prefix"
