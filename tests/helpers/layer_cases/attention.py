"""nn.MultiheadAttention: self-attention and attention to a memory, with every kind of mask and both layouts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.layer_cases.case import LayerCase, Matrix

WIDTH, TARGETS, SOURCES = 6, 4, 5


def case(key="self", batch=3, padding=None, pairs=None, call=None, **arguments):
    """How to make a layer and what to call it with; ``batch=None`` is one sequence without that dimension."""

    def make():
        layer = nn.MultiheadAttention(**({"embed_dim": WIDTH, "num_heads": 2} | arguments))
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.5
        sources = TARGETS if key == "self" else SOURCES
        query, memory, other = (
            tokens(length, batch, width, layer.batch_first)
            for length, width in ((TARGETS, WIDTH), (sources, layer.kdim), (sources, layer.vdim))
        )
        inputs = {"self": [query] * 3, "memory": [query, memory, memory], "three": [query, memory, other]}[key]
        masks = {}
        if padding:
            masks["key_padding_mask"] = padding_mask(padding, batch, sources)
        if pairs:
            masks["attn_mask"] = pairs_mask(pairs, (batch or 1) * layer.num_heads, sources)
        return layer, inputs, masks | (call or {})

    return make


def tokens(length, batch, width, batch_first):
    shape = (length, width) if batch is None else (batch, length, width) if batch_first else (length, batch, width)
    return torch.randn(shape)


def padding_mask(kind, batch, sources):
    shape = (sources,) if batch is None else (batch, sources)
    if kind == "float":
        return torch.randn(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., -1] = True
    if batch is not None:
        mask[0], mask[1, 2:] = False, True
    return mask


def pairs_mask(kind, heads, sources):
    if kind == "causal":
        return torch.ones(TARGETS, sources).triu(1).bool()
    shape = (heads, TARGETS, sources) if kind.endswith("3d") else (TARGETS, sources)
    if kind.startswith("float"):
        return torch.randn(shape)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


NO_WEIGHTS, EACH_HEAD = {"need_weights": False}, {"average_attn_weights": False}
CASES = {
    "self": case(),
    "self-no-weights": case(call=NO_WEIGHTS),
    "self-each-head": case(call=EACH_HEAD),
    "self-batch-first": case(batch_first=True),
    "self-batch-first-no-weights": case(batch_first=True, call=NO_WEIGHTS),
    "self-unbatched": case(batch=None),
    "self-unbatched-no-weights": case(batch=None, batch_first=True, call=NO_WEIGHTS),
    "self-unbatched-each-head": case(batch=None, pairs="float-3d", padding="bool", call=EACH_HEAD),
    "self-one-batch": case(batch=1, batch_first=True, pairs="bool-3d", call=NO_WEIGHTS),
    "self-three-heads": case(num_heads=3, batch_first=True),
    "self-three-heads-no-weights": case(num_heads=3, padding="bool", call=NO_WEIGHTS),
    "self-no-bias": case(bias=False, batch_first=True),
    "self-no-bias-no-weights": case(bias=False, call=NO_WEIGHTS),
    "self-bias-kv": case(add_bias_kv=True, padding="bool", pairs="bool-2d"),
    "self-bias-kv-no-weights": case(add_bias_kv=True, batch_first=True, pairs="float-3d", call=NO_WEIGHTS),
    "self-zero-attention": case(add_zero_attn=True, padding="float"),
    "self-bias-kv-zero-attention": case(add_bias_kv=True, add_zero_attn=True, padding="bool", pairs="bool-3d"),
    "self-padding": case(padding="bool", batch_first=True),
    "self-padding-no-weights": case(padding="bool", batch_first=True, call=NO_WEIGHTS),
    "self-padding-float": case(padding="float", batch_first=True, call=NO_WEIGHTS),
    "self-pairs": case(pairs="bool-2d", batch_first=True),
    "self-pairs-no-weights": case(pairs="bool-2d", batch_first=True, call=NO_WEIGHTS),
    "self-pairs-float": case(pairs="float-2d", call=EACH_HEAD),
    "self-pairs-for-each-head": case(pairs="bool-3d", batch_first=True, call=NO_WEIGHTS),
    "self-pairs-float-for-each-head": case(pairs="float-3d"),
    "self-both-masks": case(padding="bool", pairs="bool-3d", batch_first=True),
    "self-both-masks-no-weights": case(padding="bool", pairs="bool-2d", batch_first=True, call=NO_WEIGHTS),
    "self-both-masks-float": case(padding="float", pairs="float-2d", call=NO_WEIGHTS),
    "self-masks-of-two-types": case(padding="bool", pairs="float-2d", batch_first=True),
    "self-causal": case(pairs="causal", batch_first=True, call={"is_causal": True}),
    "self-causal-no-weights": case(pairs="causal", batch_first=True, call=NO_WEIGHTS | {"is_causal": True}),
    "self-causal-padding": case(pairs="causal", padding="bool", call=NO_WEIGHTS | {"is_causal": True}),
    "memory": case("memory"),
    "memory-no-weights": case("memory", batch_first=True, padding="bool", call=NO_WEIGHTS),
    "memory-three-heads": case("memory", num_heads=3, bias=False, pairs="float-3d", call=EACH_HEAD),
    "memory-unbatched": case("memory", batch=None, padding="float"),
    "three": case("three", batch_first=True),
    "three-no-weights": case("three", pairs="bool-2d", call=NO_WEIGHTS),
    "kdim": case("three", kdim=5, vdim=7),
    "kdim-no-weights": case("three", kdim=5, vdim=7, batch_first=True, padding="bool", call=NO_WEIGHTS),
    "kdim-memory": case("memory", kdim=5, vdim=5, batch_first=True, pairs="bool-3d", add_zero_attn=True),
    "kdim-no-bias": case("three", kdim=5, bias=False, num_heads=3, call=EACH_HEAD),
    "kdim-unbatched": case("three", vdim=8, batch=None, add_bias_kv=True),
}


def matrices(plain: nn.MultiheadAttention) -> dict[str, Matrix]:
    """Rows 0:E, E:2E and 2E:3E of `in_proj_weight` are q, k and v, where they are one parameter."""
    found = {"out_proj.lora.default": Matrix("out_proj.weight", (WIDTH, WIDTH))}
    for place, (part, width) in enumerate({"q": WIDTH, "k": plain.kdim, "v": plain.vdim}.items()):
        if plain.in_proj_weight is None:
            found[f"lora.default.{part}"] = Matrix(f"{part}_proj_weight", (WIDTH, width))
        else:
            rows = (place * WIDTH, (2 - place) * WIDTH)
            found[f"lora.default.{part}"] = Matrix(
                "in_proj_weight", (WIDTH, WIDTH), lambda delta, rows=rows: F.pad(delta, (0, 0, *rows))
            )
    return found


LAYER_CASES = {
    f"attention-{name}": LayerCase(make, matrices, same_bits_when_disabled=False) for name, make in CASES.items()
}
