"""The names and shapes of a transformer, from the numbers in its configuration.

Configurations differ in what they call these numbers, and in three ways of building a block: as Llama does (gated MLP,
RMS norms, rotary positions, few biases), as GPT-2 does (learned positions, biases everywhere), or as BERT does (the
same, with a norm after the embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
CALLED = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Transformer:
    """The numbers that the size of a transformer follows from.

    Args:
        hidden: length of the vectors between blocks.
        layers: number of blocks.
        vocab: number of tokens.
        intermediate: width of the MLP; ``None`` is four times ``hidden``.
        heads: of the attention; only their number for keys and values matters, where it is smaller.
        kv_heads: heads of keys and values; ``None`` is as many as ``heads``.
        head_size: length of a head's vectors; ``None`` is ``hidden / heads``.
        positions: learned positions; 0 for rotary ones.
        types: learned token types, as in BERT.
        gated: whether the MLP has a third matrix, a gate, and norms have no bias.
        biases: of ``"none"``, ``"qkv"``, ``"attn"`` or ``"all"`` maps.
        tied: whether the output head is the embedding's matrix.
        head_norms: whether queries and keys are normalized head by head.
        pooled: whether there is a norm after the embeddings and a pooler at the end, and no head: BERT's encoder.
        fused: whether query, key and value are one map.
    """

    hidden: int
    layers: int
    vocab: int
    intermediate: int | None = None
    heads: int = 1
    kv_heads: int | None = None
    head_size: int | None = None
    positions: int = 0
    types: int = 0
    gated: bool = False
    biases: str = "none"
    tied: bool = True
    head_norms: bool = False
    pooled: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        for field in ("hidden", "layers", "vocab", "heads", "intermediate", "kv_heads", "head_size"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31):
                raise ValueError(f"`{field}` must be a positive integer below 2**31, but got {value!r}.")

    def shapes(self) -> Shapes:
        """Every parameter's shape by name."""
        h = self.hidden
        found: Shapes = {"embed_tokens.weight": (self.vocab, h)}
        found |= {"embed_positions.weight": (self.positions, h)} if self.positions else {}
        found |= {"embed_types.weight": (self.types, h)} if self.types else {}
        found |= self._norm("embed_norm" if self.pooled else "norm")
        for layer in range(self.layers):
            found |= {f"layers.{layer}.{name}": shape for name, shape in self._block().items()}
        if self.pooled:
            found |= _linear("pooler", h, h, True)
        return found if self.tied or self.pooled else found | {"lm_head.weight": (self.vocab, h)}

    def _block(self) -> Shapes:
        h, size = self.hidden, self.head_size or self.hidden // self.heads
        q, kv, wide = size * self.heads, size * (self.kv_heads or self.heads), self.intermediate or 4 * h
        every, attn = self.biases == "all", self.biases in ("attn", "all")
        sizes = {"qkv": q + 2 * kv} if self.fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        found: Shapes = {}
        for name, out_features in sizes.items():
            found |= _linear(f"attn.{name}", h, out_features, self.biases != "none")
        found |= _linear("attn.o_proj", q, h, attn)
        found |= _linear("mlp.gate_proj", h, wide, every) if self.gated else {}
        found |= _linear("mlp.up_proj", h, wide, every) | _linear("mlp.down_proj", wide, h, every)
        if self.head_norms:
            found |= {"attn.q_norm.weight": (size,), "attn.k_norm.weight": (size,)}
        return found | self._norm("input_norm") | self._norm("mlp_norm")

    def _norm(self, name: str) -> Shapes:
        keys = ("weight",) if self.gated else ("weight", "bias")
        return {f"{name}.{key}": (self.hidden,) for key in keys}


def _linear(name: str, in_features: int, out_features: int, bias: bool) -> Shapes:
    found: Shapes = {f"{name}.weight": (out_features, in_features)}
    return found | {f"{name}.bias": (out_features,)} if bias else found


def transformer_of(config: Mapping[str, Any]) -> Transformer:
    """The transformer that a ``config.json`` of the transformers library describes.

    It is exact for Llama, Mistral, Qwen 2 and 3, GPT-2 and BERT, and near for what is built like one of them.

    Raises:
        ValueError: if it describes experts, or lacks a number that is needed.

    Example:
        >>> gpt2 = transformer_of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
        ...                        "n_positions": 1024, "vocab_size": 50257})
        >>> gpt2.hidden, gpt2.gated, gpt2.shapes()["layers.0.attn.qkv.weight"]
        (768, False, (2304, 768))
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and _number(config, "hidden") is None:
        return transformer_of(inner)
    if any((config.get(key) or 0) not in (0, 1) for key in EXPERTS):
        raise ValueError(
            "The configuration describes a mixture of experts, which its numbers do not tell the names of: give the "
            "safetensors file or its directory instead, whose header has every shape."
        )
    for needed in ("hidden", "layers", "vocab"):
        if _number(config, needed) is None:
            raise ValueError(
                f"The configuration has none of {', '.join(map(repr, CALLED[needed]))}: which is `{needed}`?"
            )
    return Transformer(**_sizes(config), **_style(config))


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("hidden", "layers", "vocab", "intermediate", "kv_heads", "head_size")
    return {field: _number(config, field) for field in fields} | {"heads": _number(config, "heads") or 1}


def _style(config: Mapping[str, Any]) -> dict[str, Any]:
    kind, positions = str(config.get("model_type", "")), _number(config, "positions") or 0
    if "rms_norm_eps" in config:
        biases = "attn" if config.get("attention_bias") else "qkv" if kind.startswith("qwen2") else "none"
        tied = bool(config.get("tie_word_embeddings", False))
        return {"gated": True, "biases": biases, "tied": tied, "head_norms": kind.startswith("qwen3")}
    types = config.get("type_vocab_size") or 0
    style = {"positions": positions, "types": types, "biases": "all", "pooled": bool(types)}
    return style | {"fused": kind == "gpt2"}


def _number(config: Mapping[str, Any], field: str) -> Any:
    return next((config[key] for key in CALLED[field] if config.get(key) is not None), None)
