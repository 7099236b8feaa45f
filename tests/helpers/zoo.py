"""Tiny random models of many Hugging Face architectures, and which layers each preset should choose in them.

The expectations are written by hand from transformers' modeling files; they know nothing of lightning_lora.

    "attn"   every query, key, value and output projection of every attention block
    "qv"     queries and values; `<module>.q` and `<module>.v` are slices of a fused map, `rows` says which
    "mlp"    every linear map of the feed-forward of every transformer block, shared experts included
    "all"    every linear map but output heads (known by name, or by sharing the embedding's weight) and routers
    None     there is no such layer: an error

Names are folded: every part that is a number is `*`, and the count says how many modules have that folded name.
`<experts>.gate_up_proj` is a parameter of three dimensions; `<mha>.q`, `.k`, `.v` are slices of an
nn.MultiheadAttention. Where experts could disagree, a `Doubt` says about what: there, either answer will do.
"""

import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PRESETS = ("attn", "qv", "mlp", "all")
Counts = dict[str, int]

# Arguments that make the vision transformers of timm small.
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}


# What a case is


@dataclass(frozen=True)
class Doubt:
    """In these presets, `names` may be chosen or not."""

    presets: str
    names: str
    why: str


@dataclass(frozen=True)
class Case:
    model: str
    config: str
    arguments: dict[str, Any]
    inputs: str
    expected: dict[str, Counts | None]
    rows: dict[str, str] = field(default_factory=dict)
    """How a fused map's output rows are laid out: "q k v" in thirds, "4 x q k v" that four times (once a head)."""
    doubts: tuple[Doubt, ...] = ()
    idle: tuple[str, ...] = ()
    """Modules, by their full names, that the output does not depend on."""


@dataclass(frozen=True)
class Attention:
    attn: Counts
    qv: Counts
    rows: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: "Attention") -> "Attention":
        return Attention(self.attn | other.attn, self.qv | other.qv, self.rows | other.rows)


def fold(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def names(module: str, leaves: str, n: int = 2) -> Counts:
    return {f"{module}.{leaf}": n for leaf in leaves.split()}


def separate(module: str, leaves: str = "q_proj k_proj v_proj o_proj", n: int = 2) -> Attention:
    """Four layers: query, key, value, output, in this order."""
    query, _, value, _ = leaves.split()
    return Attention(names(module, leaves, n), names(module, f"{query} {value}", n))


def fused(module: str, qkv: str, out: str, rows: str = "q k v", n: int = 2) -> Attention:
    return Attention(names(module, f"{qkv} {out}", n), names(module, f"{qkv}.q {qkv}.v", n), {f"{module}.{qkv}": rows})


def packed(module: str, n: int = 2) -> Attention:
    """An nn.MultiheadAttention with its `in_proj_weight`."""
    return Attention(names(module, "q k v out_proj", n), names(module, "q v", n), {module: "q k v"})


def case(
    model: str,
    config: str,
    arguments: dict[str, Any],
    inputs: str = "text",
    attention: Attention | None = None,
    mlp: Counts | None = None,
    other: Counts | None = None,
    doubts: tuple[Doubt, ...] = (),
    idle: str = "",
) -> Case:
    """`other` is what "all" chooses beyond attention and feed-forward."""
    groups = [attention.attn if attention else {}, mlp or {}, other or {}]
    everything = {name: n for group in groups for name, n in group.items()}
    assert len(everything) == sum(map(len, groups)), "a name in two groups"
    return Case(
        model,
        config,
        arguments,
        inputs,
        {
            "attn": attention.attn if attention else None,
            "qv": attention.qv if attention else None,
            "mlp": mlp or None,
            "all": everything or None,
        },
        attention.rows if attention else {},
        doubts,
        tuple(idle.split()),
    )


def doubtful(case: Case, preset: str) -> set[str]:
    """The folded names that `preset` may choose or not."""
    return {name for doubt in case.doubts if preset in doubt.presets.split() for name in doubt.names.split()}


def differences(case: Case, preset: str, found: Counts | None) -> dict[str, tuple[int, int]]:
    """Where `found` (None: the preset was an error) is not as expected: {folded name: (expected, found)}."""
    expected, found = case.expected[preset] or {}, found or {}
    decided = (expected.keys() | found.keys()) - doubtful(case, preset)
    pairs = {name: (expected.get(name, 0), found.get(name, 0)) for name in sorted(decided)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def rows(layout: str, size: int) -> dict[str, list[int]]:
    """The output rows of each letter, of a fused map with `size` rows: {"q": [0, 1, ...], "k": ...}."""
    times, _, pattern = layout.rpartition(" x ")
    blocks = [(block[0], int(block[1:] or 1)) for _ in range(int(times or 1)) for block in pattern.split()]
    unit, rest = divmod(size, sum(width for _, width in blocks))
    assert rest == 0, f"{size} rows cannot be {layout}"
    found: dict[str, list[int]] = {letter: [] for letter, _ in blocks}
    start = 0
    for letter, width in blocks:
        found[letter].extend(range(start, start + width * unit))
        start += width * unit
    return found


# Building and running


def build(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode and its inputs, always the same; no global random stream is moved."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, case.config)(**case.arguments)
    with seeded():
        model = getattr(transformers, case.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # a gate that starts at zero would switch its block off
                if parameter.numel() and (parameter - parameter.mean()).abs().max() < 1e-3:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model, INPUTS[case.inputs]()


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Everything floating that the model returns, flattened into one tensor."""
    with seeded():
        result = model(**inputs)
    return torch.cat([piece.flatten().float() for piece in floats(result)])


def floats(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from floats(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from floats(value)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed torch and Python, and give their streams back."""
    states = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(0)
    random.seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])


def count(found: Iterator[str] | list[str]) -> Counts:
    """Folded names and how many modules have each."""
    return dict(Counter(map(fold, found)))


# Inputs. Token 98 stands for a place of an image, and ends a text for CLIP.


def ids(length: int = 8) -> Tensor:
    return torch.randint(3, 95, (2, length))


def around(image_tokens: int, length: int = 10) -> Tensor:
    tokens = ids(length)
    tokens[:, 2 : 2 + image_tokens] = 98
    return tokens


def ended() -> Tensor:
    tokens = ids()
    tokens[:, -1] = 98
    return tokens


def first_only(length: int = 8) -> Tensor:
    return torch.eye(length, dtype=torch.long)[:1].repeat(2, 1)


def picture(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": lambda: {"input_ids": ids()},
    "text16": lambda: {"input_ids": ids(16)},
    "text64": lambda: {"input_ids": ids(64)},
    "text, encoded": lambda: {"input_ids": ids(), "encoder_hidden_states": torch.randn(2, 5, 32)},
    "text, global": lambda: {"input_ids": ids(), "global_attention_mask": first_only()},
    "seq2seq": lambda: {"input_ids": ids(), "decoder_input_ids": ids(5)},
    "seq2seq64": lambda: {"input_ids": ids(64), "decoder_input_ids": ids(64)},
    "seq2seq, global": lambda: {"input_ids": ids(), "decoder_input_ids": ids(5), "global_attention_mask": first_only()},
    "image": lambda: {"pixel_values": picture()},
    "image64": lambda: {"pixel_values": picture(64)},
    "image128": lambda: {"pixel_values": picture(128)},
    "image32": lambda: {"pixel_values": picture(32)},
    "image, points": lambda: {"pixel_values": picture(32), "input_points": torch.full((2, 1, 1, 2), 7.0)},
    "image, noise": lambda: {"pixel_values": picture(), "noise": torch.rand(2, 4)},
    "video": lambda: {"pixel_values": torch.randn(2, 2, 3, 16, 16)},
    "audio": lambda: {"input_values": torch.randn(2, 400)},
    "audio to text": lambda: {"input_values": torch.randn(2, 400), "decoder_input_ids": ids(5)},
    "mel": lambda: {"input_values": torch.randn(2, 16, 8)},
    "frames": lambda: {"input_features": torch.randn(2, 8, 16)},
    "mel to text": lambda: {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids(5)},
    "frames to text": lambda: {"input_features": torch.randn(2, 24, 8), "decoder_input_ids": ids(5)},
    "long audio to text": lambda: {"input_values": torch.randn(2, 4000), "decoder_input_ids": ids(5)},
    "patches to text": lambda: {
        "flattened_patches": torch.cat([torch.ones(2, 8, 2), torch.randn(2, 8, 24)], -1),
        "decoder_input_ids": ids(5),
    },
    "image to text": lambda: {"pixel_values": picture(), "decoder_input_ids": ids(5)},
    "text + audio": lambda: {"input_ids": ids(), "input_features": torch.randn(2, 1, 64, 8)},
    "text + image": lambda: {"input_ids": ids(), "pixel_values": picture()},
    "text, ended + image": lambda: {"input_ids": ended(), "pixel_values": picture()},
    "text + image, masked": lambda: {"input_ids": ids(), "pixel_values": picture(), "pixel_mask": ones(2, 16, 16)},
    "3 tokens of an image": lambda: {"input_ids": around(3), "pixel_values": picture()},
    "4 tokens of an image": lambda: {"input_ids": around(4), "pixel_values": picture()},
    "1 token of images": lambda: {"input_ids": around(1), "pixel_values": picture()[:, None]},
    "text with a place for an image": lambda: {
        "input_ids": ids(),
        "pixel_values": picture(),
        "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]] * 2),
    },
    "3 tokens of images": lambda: {"input_ids": around(3), "pixel_values": picture()[:, None]},
    "idefics": lambda: {
        "input_ids": ids(),
        "attention_mask": ones(2, 8),
        "pixel_values": picture()[:, None],
        "image_attention_mask": ones(2, 8, 1),
    },
    "mllama": lambda: {
        "input_ids": around(1),
        "pixel_values": torch.randn(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": ones(2, 1),
        "aspect_ratio_mask": ones(2, 1, 2),
        "cross_attention_mask": ones(2, 10, 1, 2),
    },
    "qwen2_vl": lambda: {
        "input_ids": (tokens := around(4)),
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (tokens == 98).long(),
    },
    "regions": lambda: {"input_ids": ids(), "visual_feats": torch.randn(2, 3, 16), "visual_pos": torch.rand(2, 3, 4)},
    "boxes": lambda: {"input_ids": ids(), "bbox": ones(2, 8, 4)},
    "entities": lambda: {
        "input_ids": ids(),
        "entity_ids": ones(2, 2),
        "entity_attention_mask": ones(2, 2),
        "entity_position_ids": torch.tensor([[[1, 2], [3, -1]]] * 2),
    },
    "codes": lambda: {"input_ids": ids().repeat(2, 1), "encoder_hidden_states": torch.randn(2, 4, 32)},
    "series": lambda: {
        "past_values": torch.randn(2, 8),
        "past_time_features": torch.randn(2, 8, 2),
        "past_observed_mask": torch.ones(2, 8),
        "future_values": torch.randn(2, 3),
        "future_time_features": torch.randn(2, 3, 2),
    },
    "list of series": lambda: {"past_values": [torch.randn(16), torch.randn(12)]},
    "patches of series": lambda: {"past_values": torch.randn(2, 16, 2)},
}


# Sizes. (`{**{...}, **{...}}`: one row of arguments on a line.)

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 99, **SIZES, "max_position_embeddings": 64}
LM = {**TEXT, **IDS}
GROUPED = {**LM, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
N_EMBD = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT = {**N_EMBD, **IDS}
SSM = {"mamba_d_state": 4, "mamba_d_conv": 2}
LAYERS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
D_MODEL = {"vocab_size": 99, "d_model": 32, **LAYERS, **IDS, "decoder_start_token_id": 2}
SEQ2SEQ = {**D_MODEL, "max_position_embeddings": 64}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5 = {**T5, "pad_token_id": 0, "decoder_start_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
CLASSES = {"num_labels": 3}
STAGES = {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0}
PYRAMID = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "mlp_ratios": [2, 2]}
PYRAMID = {**PYRAMID, "num_attention_heads": [2, 4]}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 2,
    "mlp_ratio": 2.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
WAVE = {
    "vocab_size": 30,
    **SIZES,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
QWEN_VISION = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
QWEN_TOKENS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}

# Names that many families share

SELF = "model.layers.*.self_attn"
MLP = "model.layers.*.mlp"
GATED = "gate_proj up_proj down_proj"
EXPERTS = "gate_up_proj down_proj"
OUT = "q_proj k_proj v_proj out_proj"
BERT = "self.query self.key self.value output.dense"
VIT = "attention.query attention.key attention.value output.dense"
DENSE = "intermediate.dense output.dense"
GLOBAL = "self.query_global self.key_global self.value_global"
LLAMA = separate(SELF)
LLAMA_MLP = names(MLP, GATED)
FAIRSEQ = (  # BART and its many children
    separate("model.encoder.layers.*.self_attn", OUT)
    + separate("model.decoder.layers.*.self_attn", OUT)
    + separate("model.decoder.layers.*.encoder_attn", OUT)
)
FAIRSEQ_MLP = names("model.encoder.layers.*", "fc1 fc2") | names("model.decoder.layers.*", "fc1 fc2")
T5_ATTENTION = (
    separate("encoder.block.*.layer.*.SelfAttention", "q k v o")
    + separate("decoder.block.*.layer.*.SelfAttention", "q k v o")
    + separate("decoder.block.*.layer.*.EncDecAttention", "q k v o")
)


def bert_attention(prefix: str, leaves: str = BERT, n: int = 2) -> Attention:
    return separate(f"{prefix}.attention", leaves, n)


def in_head(*found: str) -> tuple[Doubt, ...]:
    return (Doubt("all", " ".join(found), "a hidden map inside a module that is named as the output head"),)


# Decoders

DECODERS = {
    "gpt2": case(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT,
        attention=fused("transformer.h.*.attn", "c_attn", "c_proj"),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "gpt2_cross": case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT, "add_cross_attention": True},
        "text, encoded",
        attention=fused("transformer.h.*.attn", "c_attn", "c_proj")
        + Attention(
            names("transformer.h.*.crossattention", "q_attn c_attn c_proj"),
            names("transformer.h.*.crossattention", "q_attn c_attn.v"),
            {"transformer.h.*.crossattention.c_attn": "k v"},
        ),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "openai_gpt": case(
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        N_EMBD,
        attention=fused("transformer.h.*.attn", "c_attn", "c_proj"),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "imagegpt": case(
        "ImageGPTModel",
        "ImageGPTConfig",
        N_EMBD,
        attention=fused("h.*.attn", "c_attn", "c_proj"),
        mlp=names("h.*.mlp", "c_fc c_proj"),
    ),
    "gpt_neo": case(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64, **IDS},
            **{"num_layers": 2, "num_heads": 4, "window_size": 4, "attention_types": [[["global", "local"], 1]]},
        },
        attention=separate("transformer.h.*.attn.attention", OUT),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "gpt_neox": case(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        LM,
        attention=fused("gpt_neox.layers.*.attention", "query_key_value", "dense", "4 x q k v"),
        mlp=names("gpt_neox.layers.*.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "gptj": case(
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT, "rotary_dim": 4},
        attention=separate("transformer.h.*.attn", OUT),
        mlp=names("transformer.h.*.mlp", "fc_in fc_out"),
    ),
    "codegen": case(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "n_head": 8, "n_ctx": 64, "rotary_dim": 4},
        attention=fused("transformer.h.*.attn", "qkv_proj", "out_proj", "4 x q v k"),  # four, whatever the heads
        mlp=names("transformer.h.*.mlp", "fc_in fc_out"),
    ),
    "bloom": case(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS},
        attention=fused("transformer.h.*.self_attention", "query_key_value", "dense", "4 x q k v"),
        mlp=names("transformer.h.*.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "falcon": case(  # one key and value for all heads
        "FalconForCausalLM",
        "FalconConfig",
        {**LM, "multi_query": True},
        attention=fused("transformer.h.*.self_attention", "query_key_value", "dense", "q4 k v"),
        mlp=names("transformer.h.*.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "falcon_rw": case(
        "FalconForCausalLM",
        "FalconConfig",
        {**LM, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
        attention=fused("transformer.h.*.self_attention", "query_key_value", "dense", "4 x q k v"),
        mlp=names("transformer.h.*.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "falcon_40b": case(  # groups: two queries, their key, their value
        "FalconForCausalLM",
        "FalconConfig",
        {**LM, "new_decoder_architecture": True, "num_kv_heads": 2},
        attention=fused("transformer.h.*.self_attention", "query_key_value", "dense", "2 x q2 k v"),
        mlp=names("transformer.h.*.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "persimmon": case(
        "PersimmonForCausalLM",
        "PersimmonConfig",
        LM,
        attention=fused(SELF, "query_key_value", "dense", "4 x q k v"),
        mlp=names(MLP, "dense_h_to_4h dense_4h_to_h"),
    ),
    "gpt_bigcode": case(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {**GPT, "multi_query": True},
        attention=fused("transformer.h.*.attn", "c_attn", "c_proj", "q4 k v"),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "gpt_bigcode_heads": case(  # an nn.Linear called c_attn, cut per head, unlike GPT-2's
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {**GPT, "multi_query": False},
        attention=fused("transformer.h.*.attn", "c_attn", "c_proj", "4 x q k v"),
        mlp=names("transformer.h.*.mlp", "c_fc c_proj"),
    ),
    "mpt": case(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        attention=fused("transformer.blocks.*.attn", "Wqkv", "out_proj"),
        mlp=names("transformer.blocks.*.ffn", "up_proj down_proj"),
    ),
    "dbrx": case(  # its experts lie below each other in parameters of two dimensions
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            **{"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **IDS},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        attention=fused("transformer.blocks.*.norm_attn_norm.attn", "Wqkv", "out_proj", "q2 k v"),
        doubts=(
            Doubt(
                "mlp all",
                " ".join(names("transformer.blocks.*.ffn.experts.mlp", "w1 v1 w2")),
                "experts, but not of the usual three dimensions",
            ),
        ),
    ),
    "opt": case(
        "OPTForCausalLM",
        "OPTConfig",
        {**LM, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        attention=separate("model.decoder.layers.*.self_attn", OUT),
        mlp=names("model.decoder.layers.*", "fc1 fc2"),
        other=names("model.decoder", "project_in project_out", 1),
    ),
    "xglm": case(
        "XGLMForCausalLM",
        "XGLMConfig",
        {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, **IDS},
        attention=separate(SELF, OUT),
        mlp=names("model.layers.*", "fc1 fc2"),
    ),
    "biogpt": case(
        "BioGptForCausalLM",
        "BioGptConfig",
        LM,
        attention=separate("biogpt.layers.*.self_attn", OUT),
        mlp=names("biogpt.layers.*", "fc1 fc2"),
    ),
    "ctrl": case(
        "CTRLLMHeadModel",
        "CTRLConfig",
        {**N_EMBD, "dff": 64},
        attention=separate("transformer.h.*.multi_head_attention", "Wq Wk Wv dense"),
        mlp={"transformer.h.*.ffn.*": 4},
    ),
    "llama": case("LlamaForCausalLM", "LlamaConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "mistral_classifier": case(
        "MistralForSequenceClassification", "MistralConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP
    ),
    "qwen2_tied": case(
        "Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, attention=LLAMA, mlp=LLAMA_MLP
    ),
    "qwen3": case("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, attention=LLAMA, mlp=LLAMA_MLP),
    "gemma": case("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, attention=LLAMA, mlp=LLAMA_MLP),
    "gemma2": case("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}, attention=LLAMA, mlp=LLAMA_MLP),
    "gemma3": case("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}, attention=LLAMA, mlp=LLAMA_MLP),
    "stablelm": case("StableLmForCausalLM", "StableLmConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "olmo": case("OlmoForCausalLM", "OlmoConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "olmo2": case("Olmo2ForCausalLM", "Olmo2Config", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "cohere": case("CohereForCausalLM", "CohereConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "granite": case("GraniteForCausalLM", "GraniteConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "phi": case(
        "PhiForCausalLM",
        "PhiConfig",
        LM,
        attention=separate(SELF, "q_proj k_proj v_proj dense"),
        mlp=names(MLP, "fc1 fc2"),
    ),
    "phi3": case(
        "Phi3ForCausalLM",
        "Phi3Config",
        GROUPED,
        attention=fused(SELF, "qkv_proj", "o_proj", "q2 k v"),
        mlp=names(MLP, "gate_up_proj down_proj"),
    ),
    "starcoder2": case(
        "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, attention=LLAMA, mlp=names(MLP, "c_fc c_proj")
    ),
    "nemotron": case(
        "NemotronForCausalLM",
        "NemotronConfig",
        {**GROUPED, "head_dim": 8},
        attention=LLAMA,
        mlp=names(MLP, "up_proj down_proj"),
    ),
    "glm": case(
        "GlmForCausalLM",
        "GlmConfig",
        {**GROUPED, "head_dim": 8},
        attention=LLAMA,
        mlp=names(MLP, "gate_up_proj down_proj"),
    ),
    "glm4": case(
        "Glm4ForCausalLM",
        "Glm4Config",
        {**GROUPED, "head_dim": 8},
        attention=LLAMA,
        mlp=names(MLP, "gate_up_proj down_proj"),
    ),
    "mixtral": case(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, **LOCAL},
        attention=LLAMA,
        mlp=names(f"{MLP}.experts", EXPERTS),
    ),
    "phimoe": case(
        "PhimoeForCausalLM", "PhimoeConfig", {**GROUPED, **LOCAL}, attention=LLAMA, mlp=names(f"{MLP}.experts", EXPERTS)
    ),
    "olmoe": case(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        attention=LLAMA,
        mlp=names(f"{MLP}.experts", EXPERTS),
    ),
    "qwen2_moe": case(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED, **MOE, "shared_expert_intermediate_size": 48},
        attention=LLAMA,
        mlp=names(f"{MLP}.experts", EXPERTS) | names(f"{MLP}.shared_expert", GATED),  # not shared_expert_gate
    ),
    "qwen3_moe": case(  # the first layer is dense
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, **MOE, "head_dim": 8, "mlp_only_layers": [0]},
        attention=LLAMA,
        mlp=names(MLP, GATED, 1) | names(f"{MLP}.experts", EXPERTS, 1),
    ),
    "granitemoe": case(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**GROUPED, **LOCAL},
        attention=LLAMA,
        mlp=names("model.layers.*.block_sparse_moe.experts", EXPERTS),
    ),
    "granitemoeshared": case(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**GROUPED, **LOCAL, "shared_intermediate_size": 48},
        attention=LLAMA,
        mlp=names("model.layers.*.block_sparse_moe.experts", EXPERTS)
        | names("model.layers.*.shared_mlp", "input_linear output_linear"),
    ),
    "gpt_oss": case(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, **LOCAL, "head_dim": 8},
        attention=LLAMA,
        mlp=names(f"{MLP}.experts", EXPERTS),
    ),
    "llama4": case(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **{**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "attention_chunk_size": 32},
            **{"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        },
        attention=LLAMA,
        mlp=names("model.layers.*.feed_forward", GATED, 1)
        | names("model.layers.*.feed_forward.experts", EXPERTS, 1)
        | names("model.layers.*.feed_forward.shared_expert", GATED, 1),
    ),
    "deepseek_v2": case(  # queries without a low rank; kv_b_proj holds, per head, a key and a value
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            **{
                **LM,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
            },
            **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
            **{"first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
        attention=Attention(
            names(SELF, "q_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
            names(SELF, "q_proj kv_b_proj.v"),
            {f"{SELF}.kv_b_proj": "4 x k v"},
        ),
        mlp=names(MLP, GATED, 1) | names(f"{MLP}.experts", EXPERTS, 1) | names(f"{MLP}.shared_experts", GATED, 1),
    ),
    "deepseek_v3": case(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **{
                **LM,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
            },
            **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
            **{"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 16},
        },
        attention=Attention(
            names(SELF, "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
            names(SELF, "q_a_proj q_b_proj kv_b_proj.v"),
            {f"{SELF}.kv_b_proj": "4 x k v2"},
        ),
        mlp=names(MLP, GATED, 1) | names(f"{MLP}.experts", EXPERTS, 1) | names(f"{MLP}.shared_experts", GATED, 1),
        doubts=(Doubt("qv", f"{SELF}.q_a_proj", "it makes the latent of the queries, not the queries"),),
    ),
    "jetmoe": case(  # queries and outputs are experts, too
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, **IDS},
            **{"num_key_value_heads": 2, "kv_channels": 8, **LOCAL},
        },
        "text16",
        attention=Attention(
            names("model.layers.*.self_attention", "experts.input_linear.weight kv_proj experts.output_linear.weight"),
            names("model.layers.*.self_attention", "experts.input_linear.weight kv_proj.v"),
            {"model.layers.*.self_attention.kv_proj": "k v"},
        ),
        mlp=names(MLP, "input_linear.weight output_linear.weight"),
        doubts=(
            Doubt(
                "attn qv all",
                " ".join(names("model.layers.*.self_attention.experts", "input_linear.weight output_linear.weight")),
                "attention projections that are experts: few will find them",
            ),
            Doubt(
                "mlp all",
                " ".join(names(MLP, "input_linear.weight output_linear.weight")),
                "one parameter of three dimensions called `weight` in a module of its own",
            ),
        ),
    ),
}

# Decoders with other mixers than attention, or without any attention

MAMBA = "in_proj x_proj dt_proj out_proj"

RECURRENT = {
    "jamba": case(  # one layer of each: Mamba with an MLP, attention with experts
        "JambaForCausalLM",
        "JambaConfig",
        {
            **{**GROUPED, **SSM, "num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 4},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        },
        attention=separate(SELF, n=1),
        mlp=names("model.layers.*.feed_forward", GATED, 1) | names("model.layers.*.feed_forward.experts", EXPERTS, 1),
        other=names("model.layers.*.mamba", MAMBA, 1),
    ),
    "bamba": case(
        "BambaForCausalLM",
        "BambaConfig",
        {
            **{**GROUPED, **SSM, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2},
            **{"mamba_chunk_size": 8, "attn_layer_indices": [1]},
        },
        attention=separate(SELF, n=1),
        mlp=names("model.layers.*.feed_forward", GATED),
        other=names("model.layers.*.mamba", "in_proj out_proj", 1),
    ),
    "falcon_h1": case(  # attention and Mamba side by side in every layer
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **{**GROUPED, **SSM, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_ssm": 32},
            **{"mamba_chunk_size": 8, "head_dim": 8},
        },
        attention=LLAMA,
        mlp=names("model.layers.*.feed_forward", GATED),
        other=names("model.layers.*.mamba", "in_proj out_proj"),
    ),
    "zamba2": case(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **{**LM, **SSM, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1},
            **{"use_mem_rope": True, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4, "chunk_size": 8},
            "attention_hidden_size": 64,
        },
        attention=separate("model.layers.*.shared_transformer.self_attn", n=1),
        mlp=names("model.layers.*.shared_transformer.feed_forward", "gate_up_proj down_proj", 1)
        | {"model.layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.*": 2},
        other=names("model.layers.*.mamba", "in_proj out_proj", 1)
        | names("model.layers.*.mamba_decoder.mamba", "in_proj out_proj", 1)
        | names("model.layers.*", "linear", 1),
        doubts=(
            Doubt(
                "mlp all",
                "model.layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.*",
                "low-rank adapters of the architecture's own",
            ),
        ),
    ),
    "nemotron_h": case(  # every layer is one of four, all called `mixer`
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **{**GROUPED, "layers_block_type": ["mamba", "mlp", "full_attention", "moe"], "head_dim": 8},
            **{"ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "conv_kernel": 2},
            **{"chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
            **{"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 48},
        },
        attention=separate("model.layers.*.mixer", n=1),
        mlp=names("model.layers.*.mixer", "up_proj down_proj", 1)
        | names("model.layers.*.mixer.experts", "up_proj down_proj", 1)
        | names("model.layers.*.mixer.shared_experts", "up_proj down_proj", 1),
        other=names("model.layers.*.mixer", "in_proj out_proj", 1),
    ),
    "recurrent_gemma": case(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **{"vocab_size": 99, **SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
            **{"block_types": ["recurrent", "attention"], **IDS},
        },
        attention=separate("model.layers.*.temporal_block", n=1),
        mlp=names("model.layers.*.mlp_block", GATED),
        other=names("model.layers.*.temporal_block", "linear_x linear_y linear_out", 1),
    ),
    "lfm2": case(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8},
        attention=separate(SELF, OUT, 1),
        mlp=names("model.layers.*.feed_forward", "w1 w2 w3"),
        other=names("model.layers.*.conv", "in_proj out_proj", 1),
    ),
    "qwen3_next": case(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **{**GROUPED, **MOE, "shared_expert_intermediate_size": 48, "head_dim": 8},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "layer_types": ["linear_attention", "full_attention"],
        },
        attention=separate(SELF, n=1)
        + fused("model.layers.*.linear_attn", "in_proj_qkvz", "out_proj", "2 x q k v2 z2", 1),
        mlp=names(f"{MLP}.experts", EXPERTS) | names(f"{MLP}.shared_expert", GATED),
        other=names("model.layers.*.linear_attn", "in_proj_ba", 1),
        doubts=(
            Doubt(
                "attn qv",
                " ".join(
                    names(
                        "model.layers.*.linear_attn", "in_proj_qkvz in_proj_qkvz.q in_proj_qkvz.v in_proj_ba out_proj"
                    )
                ),
                "a gated delta net is attention by name, and a recurrence by what it does",
            ),
        ),
    ),
    "minimax": case(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**GROUPED, **LOCAL, "head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
        attention=separate(SELF, n=1) + fused(SELF, "qkv_proj", "out_proj", "4 x q k v", 1),
        mlp=names(f"{MLP}.experts", EXPERTS),
        other=names(SELF, "output_gate", 1),
        doubts=(Doubt("attn", f"{SELF}.output_gate", "a projection of the attention block, but a gate"),),
    ),
    "mamba": case(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        other=names("backbone.layers.*.mixer", MAMBA),
        doubts=(Doubt("all", "backbone.layers.*.mixer.dt_proj", "the CUDA path reads its weight directly"),),
    ),
    "mamba2": case(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            **{"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        },
        other=names("backbone.layers.*.mixer", "in_proj out_proj"),
    ),
    "falcon_mamba": case(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        other=names("backbone.layers.*.mixer", MAMBA),
        doubts=(Doubt("all", "backbone.layers.*.mixer.dt_proj", "the CUDA path reads its weight directly"),),
    ),
    "rwkv": case(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "context_length": 64, "use_cache": False, **IDS},
        },
        mlp=names("rwkv.blocks.*.feed_forward", "key receptance value"),
        other=names("rwkv.blocks.*.attention", "key value receptance output"),
        doubts=(
            Doubt(
                "attn qv",
                " ".join(names("rwkv.blocks.*.attention", "key value receptance output")),
                "attention by name, without queries",
            ),
        ),
    ),
}


# Encoders

BERT_CONFIG = {**TEXT, "type_vocab_size": 2}
PREDICTIONS = names("cls.predictions.transform", "dense", 1)

ENCODERS = {
    "bert_classifier": case(
        "BertForSequenceClassification",
        "BertConfig",
        BERT_CONFIG,
        attention=bert_attention("bert.encoder.layer.*"),
        mlp=names("bert.encoder.layer.*", DENSE),
        other={"bert.pooler.dense": 1},
    ),
    "bert_masked": case(
        "BertForMaskedLM",
        "BertConfig",
        BERT_CONFIG,
        attention=bert_attention("bert.encoder.layer.*"),
        mlp=names("bert.encoder.layer.*", DENSE),
        other=PREDICTIONS,
    ),
    "bert_cross": case(
        "BertLMHeadModel",
        "BertConfig",
        {**BERT_CONFIG, "is_decoder": True, "add_cross_attention": True},
        "text, encoded",
        attention=bert_attention("bert.encoder.layer.*") + separate("bert.encoder.layer.*.crossattention", BERT),
        mlp=names("bert.encoder.layer.*", DENSE),
        other=PREDICTIONS,
    ),
    "roberta_masked": case(
        "RobertaForMaskedLM",
        "RobertaConfig",
        {**BERT_CONFIG, "pad_token_id": 1},
        attention=bert_attention("roberta.encoder.layer.*"),
        mlp=names("roberta.encoder.layer.*", DENSE),
        doubts=in_head("lm_head.dense"),
    ),
    "roberta_classifier": case(  # classifier.dense and classifier.out_proj are the head
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**BERT_CONFIG, "pad_token_id": 1},
        attention=bert_attention("roberta.encoder.layer.*"),
        mlp=names("roberta.encoder.layer.*", DENSE),
    ),
    "distilbert": case(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        attention=separate("distilbert.transformer.layer.*.attention", "q_lin k_lin v_lin out_lin"),
        mlp=names("distilbert.transformer.layer.*.ffn", "lin1 lin2"),
        other={"vocab_transform": 1},
    ),
    "albert": case(  # one layer, used twice
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**BERT_CONFIG, "embedding_size": 16},
        attention=separate(
            "albert.encoder.albert_layer_groups.*.albert_layers.*.attention", "query key value dense", 1
        ),
        mlp=names("albert.encoder.albert_layer_groups.*.albert_layers.*", "ffn ffn_output", 1),
        other={"albert.encoder.embedding_hidden_mapping_in": 1, "predictions.dense": 1},
    ),
    "electra": case(
        "ElectraForTokenClassification",
        "ElectraConfig",
        {**BERT_CONFIG, "embedding_size": 16},
        attention=bert_attention("electra.encoder.layer.*"),
        mlp=names("electra.encoder.layer.*", DENSE),
        other={"electra.embeddings_project": 1},
    ),
    "deberta": case(
        "DebertaForMaskedLM",
        "DebertaConfig",
        {
            **BERT_CONFIG,
            **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
            "position_biased_input": False,
        },
        attention=fused("deberta.encoder.layer.*.attention", "self.in_proj", "output.dense", "4 x q k v")
        + Attention(names("deberta.encoder.layer.*.attention.self", "pos_proj pos_q_proj"), {}),
        mlp=names("deberta.encoder.layer.*", DENSE),
        other=PREDICTIONS,
        doubts=(
            Doubt(
                "attn",
                " ".join(names("deberta.encoder.layer.*.attention.self", "pos_proj pos_q_proj")),
                "keys and queries of relative positions",
            ),
            Doubt("qv", "deberta.encoder.layer.*.attention.self.pos_q_proj", "queries of relative positions"),
        ),
    ),
    "deberta_v2": case(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **BERT_CONFIG,
            **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
            **{"position_buckets": 4, "share_att_key": False},
        },
        attention=bert_attention(
            "deberta.encoder.layer.*", "self.query_proj self.key_proj self.value_proj output.dense"
        )
        + Attention(names("deberta.encoder.layer.*.attention.self", "pos_key_proj pos_query_proj"), {}),
        mlp=names("deberta.encoder.layer.*", DENSE),
        other={"pooler.dense": 1},
        doubts=(
            Doubt(
                "attn",
                " ".join(names("deberta.encoder.layer.*.attention.self", "pos_key_proj pos_query_proj")),
                "keys and queries of relative positions",
            ),
            Doubt("qv", "deberta.encoder.layer.*.attention.self.pos_query_proj", "queries of relative positions"),
        ),
    ),
    "deberta_v3": case(  # as released: positions share the maps of the content
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **BERT_CONFIG,
            **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
            **{"position_buckets": 4, "share_att_key": True, "conv_kernel_size": 3},
        },
        attention=bert_attention(
            "deberta.encoder.layer.*", "self.query_proj self.key_proj self.value_proj output.dense"
        ),
        mlp=names("deberta.encoder.layer.*", DENSE),
        other={"pooler.dense": 1},
    ),
    "mpnet": case(
        "MPNetForMaskedLM",
        "MPNetConfig",
        TEXT,
        attention=separate("mpnet.encoder.layer.*.attention.attn", "q k v o"),
        mlp=names("mpnet.encoder.layer.*", DENSE),
        doubts=in_head("lm_head.dense"),
    ),
    "modernbert": case(  # Wo is twice in a layer
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**{**LM, "global_attn_every_n_layers": 2, "local_attention": 8}, **{"cls_token_id": 1, "sep_token_id": 2}},
        attention=fused("model.layers.*.attn", "Wqkv", "Wo"),
        mlp=names(MLP, "Wi Wo"),
        doubts=in_head("head.dense"),
    ),
    "squeezebert": case(  # its linear maps are convolutions of one position, in groups
        "SqueezeBertModel",
        "SqueezeBertConfig",
        {
            **{**BERT_CONFIG, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2},
            **{"post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2},
        },
        attention=separate("encoder.layers.*", "attention.query attention.key attention.value post_attention.conv1d"),
        mlp=names("encoder.layers.*", "intermediate.conv1d output.conv1d"),
        other={"pooler.dense": 1},
        doubts=(
            Doubt(
                "attn qv mlp all",
                " ".join(
                    names(
                        "encoder.layers.*",
                        "attention.query attention.key attention.value post_attention.conv1d "
                        "intermediate.conv1d output.conv1d",
                    )
                ),
                "convolutions that are linear maps",
            ),
        ),
    ),
    "funnel": case(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            **{"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
            **{"block_sizes": [1, 1], "num_decoder_layers": 1},
        },
        attention=separate("funnel.encoder.blocks.*.*.attention", "q_head k_head v_head post_proj")
        + separate("funnel.decoder.layers.*.attention", "q_head k_head v_head post_proj", 1),
        mlp=names("funnel.encoder.blocks.*.*.ffn", "linear_1 linear_2")
        | names("funnel.decoder.layers.*.ffn", "linear_1 linear_2", 1),
    ),
    "longformer": case(
        "LongformerForMaskedLM",
        "LongformerConfig",
        {**BERT_CONFIG, "attention_window": 4, "pad_token_id": 1},
        "text, global",
        attention=bert_attention("longformer.encoder.layer.*")
        + Attention(
            names("longformer.encoder.layer.*.attention", GLOBAL),
            names("longformer.encoder.layer.*.attention", "self.query_global self.value_global"),
        ),
        mlp=names("longformer.encoder.layer.*", DENSE),
        doubts=in_head("lm_head.dense"),
    ),
    "big_bird": case(
        "BigBirdModel",
        "BigBirdConfig",
        {**BERT_CONFIG, "attention_type": "original_full"},
        attention=bert_attention("encoder.layer.*"),
        mlp=names("encoder.layer.*", DENSE),
        other={"pooler": 1},
    ),
    "convbert": case(
        "ConvBertForMaskedLM",
        "ConvBertConfig",
        {**BERT_CONFIG, "embedding_size": 16, "head_ratio": 2, "num_groups": 1, "conv_kernel_size": 3},
        attention=bert_attention("convbert.encoder.layer.*"),
        mlp=names("convbert.encoder.layer.*", DENSE),
        other=names("convbert.encoder.layer.*.attention.self", "conv_kernel_layer conv_out_layer")
        | {"convbert.embeddings_project": 1, "generator_predictions.dense": 1},
        doubts=(
            Doubt(
                "attn",
                " ".join(names("convbert.encoder.layer.*.attention.self", "conv_kernel_layer conv_out_layer")),
                "the kernel and the input of a convolution inside the attention block",
            ),
        ),
    ),
    "xlnet": case(  # attention without layers: parameters of three dimensions, called q, k, v, o, r
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        mlp=names("transformer.layer.*.ff", "layer_1 layer_2"),
        doubts=(
            Doubt(
                "attn qv all",
                " ".join(names("transformer.layer.*.rel_attn", "q k v o r")),
                "attention projections that are parameters, not layers",
            ),
        ),
    ),
    "xlm": case(
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"n_words": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "n_langs": 1},
        attention=separate("transformer.attentions.*", "q_lin k_lin v_lin out_lin"),
        mlp=names("transformer.ffns.*", "lin1 lin2"),
    ),
    "esm": case(
        "EsmForMaskedLM",
        "EsmConfig",
        {**TEXT, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"},
        attention=bert_attention("esm.encoder.layer.*"),
        mlp=names("esm.encoder.layer.*", DENSE),
        doubts=(
            *in_head("lm_head.dense"),
            Doubt("all", "esm.contact_head.regression", "a head of one output, that a forward does not use"),
        ),
    ),
    "layoutlm": case(
        "LayoutLMForSequenceClassification",
        "LayoutLMConfig",
        {**BERT_CONFIG, "max_2d_position_embeddings": 64},
        "boxes",
        attention=bert_attention("layoutlm.encoder.layer.*"),
        mlp=names("layoutlm.encoder.layer.*", DENSE),
        other={"layoutlm.pooler.dense": 1},
    ),
    "nystromformer": case(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        {**BERT_CONFIG, "num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3},
        attention=bert_attention("nystromformer.encoder.layer.*"),
        mlp=names("nystromformer.encoder.layer.*", DENSE),
        other=PREDICTIONS,
    ),
    "fnet": case(  # Fourier transforms for attention
        "FNetModel",
        "FNetConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
            **{"max_position_embeddings": 64, "tpu_short_seq_length": 8},
        },
        mlp=names("encoder.layer.*", DENSE),
        other={"embeddings.projection": 1, "pooler.dense": 1},
    ),
    "mobilebert": case(
        "MobileBertModel",
        "MobileBertConfig",
        {
            **{**BERT_CONFIG, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
            **{"num_feedforward_networks": 2, "classifier_activation": True},
        },
        attention=bert_attention("encoder.layer.*"),
        mlp=names("encoder.layer.*", DENSE) | names("encoder.layer.*.ffn.*", DENSE),
        other=names("encoder.layer.*", "bottleneck.input.dense bottleneck.attention.dense output.bottleneck.dense")
        | {"embeddings.embedding_transformation": 1, "pooler.dense": 1},
        doubts=(
            Doubt(
                "mlp",
                " ".join(
                    names(
                        "encoder.layer.*", "bottleneck.input.dense bottleneck.attention.dense output.bottleneck.dense"
                    )
                ),
                "into the bottleneck of a block and out of it",
            ),
        ),
    ),
    "roformer": case(
        "RoFormerForMaskedLM",
        "RoFormerConfig",
        {**BERT_CONFIG, "embedding_size": 16},
        attention=bert_attention("roformer.encoder.layer.*"),
        mlp=names("roformer.encoder.layer.*", DENSE),
        other={"roformer.embeddings_project": 1, **PREDICTIONS},
    ),
    "canine": case(
        "CanineModel",
        "CanineConfig",
        {
            **{**SIZES, "max_position_embeddings": 64, "num_hash_functions": 2, "num_hash_buckets": 16},
            **{"local_transformer_stride": 4, "downsampling_rate": 2, "upsampling_kernel_size": 3},
        },
        attention=bert_attention("initial_char_encoder.layer.*", n=1)
        + bert_attention("encoder.layer.*")
        + bert_attention("final_char_encoder.layer.*", n=1),
        mlp=names("initial_char_encoder.layer.*", DENSE, 1)
        | names("encoder.layer.*", DENSE)
        | names("final_char_encoder.layer.*", DENSE, 1),
        other={"pooler.dense": 1},
    ),
    "perceiver": case(
        "PerceiverForMaskedLM",
        "PerceiverConfig",
        {
            **{"vocab_size": 99, "num_latents": 4, "d_latents": 32, "d_model": 16, "num_blocks": 1},
            **{"num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
            "max_position_embeddings": 8,
        },
        attention=bert_attention("perceiver.encoder.cross_attention", n=1)
        + bert_attention("perceiver.encoder.self_attends.*")
        + bert_attention("perceiver.decoder.decoding_cross_attention", n=1),
        mlp=names("perceiver.encoder.cross_attention.mlp", "dense1 dense2", 1)
        | names("perceiver.encoder.self_attends.*.mlp", "dense1 dense2")
        | names("perceiver.decoder.decoding_cross_attention.mlp", "dense1 dense2", 1),
    ),
}

# From sequence to sequence

T5_BLOCKS = ("encoder.block.*.layer.*", "decoder.block.*.layer.*")

TRANSLATORS = {
    "t5": case(
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        "seq2seq",
        attention=T5_ATTENTION,
        mlp=names(f"{T5_BLOCKS[0]}.DenseReluDense", "wi wo") | names(f"{T5_BLOCKS[1]}.DenseReluDense", "wi wo"),
    ),
    "flan_t5": case(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "seq2seq",
        attention=T5_ATTENTION,
        mlp=names(f"{T5_BLOCKS[0]}.DenseReluDense", "wi_0 wi_1 wo")
        | names(f"{T5_BLOCKS[1]}.DenseReluDense", "wi_0 wi_1 wo"),
    ),
    "longt5": case(
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        {**T5, "local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        "seq2seq",
        attention=separate("encoder.block.*.layer.*.TransientGlobalSelfAttention", "q k v o")
        + separate("decoder.block.*.layer.*.SelfAttention", "q k v o")
        + separate("decoder.block.*.layer.*.EncDecAttention", "q k v o"),
        mlp=names(f"{T5_BLOCKS[0]}.DenseReluDense", "wi wo") | names(f"{T5_BLOCKS[1]}.DenseReluDense", "wi wo"),
    ),
    "switch_transformers": case(  # experts that are modules; one dense and one sparse layer on each side
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **{**T5, "num_decoder_layers": 2, "num_experts": 2, "expert_capacity": 64},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        },
        "seq2seq64",
        attention=T5_ATTENTION,
        mlp={
            name: n
            for block in T5_BLOCKS
            for part in ("mlp", "mlp.experts.expert_0", "mlp.experts.expert_1")
            for name, n in names(f"{block}.{part}", "wi wo", 1).items()
        },
    ),
    "bart": case("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, "seq2seq", attention=FAIRSEQ, mlp=FAIRSEQ_MLP),
    "mbart": case(
        "MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ, "seq2seq", attention=FAIRSEQ, mlp=FAIRSEQ_MLP
    ),
    "pegasus": case(
        "PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ, "seq2seq", attention=FAIRSEQ, mlp=FAIRSEQ_MLP
    ),
    "m2m_100": case(
        "M2M100ForConditionalGeneration", "M2M100Config", SEQ2SEQ, "seq2seq", attention=FAIRSEQ, mlp=FAIRSEQ_MLP
    ),
    "marian": case("MarianMTModel", "MarianConfig", SEQ2SEQ, "seq2seq", attention=FAIRSEQ, mlp=FAIRSEQ_MLP),
    "fsmt": case(
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {
            **{name: value for name, value in SEQ2SEQ.items() if name != "vocab_size"},
            **{"src_vocab_size": 99, "tgt_vocab_size": 99, "langs": ["en", "de"]},
        },
        "seq2seq",
        attention=FAIRSEQ,
        mlp=FAIRSEQ_MLP,
        doubts=(
            Doubt("all", "model.decoder.output_projection", "an output head, by an unusual name, that is not tied"),
        ),
    ),
    "nllb_moe": case(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {**SEQ2SEQ, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64},
        "seq2seq64",
        attention=separate("model.encoder.layers.*.self_attn", OUT)
        + separate("model.decoder.layers.*.self_attn", OUT)
        + separate("model.decoder.layers.*.cross_attention", OUT),
        mlp={
            name: n
            for block in ("model.encoder.layers.*", "model.decoder.layers.*")
            for part in ("ffn", "ffn.experts.expert_0", "ffn.experts.expert_1")
            for name, n in names(f"{block}.{part}", "fc1 fc2", 1).items()
        },
    ),
    "prophetnet": case(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2},
            **{"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "ngram": 2},
            **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
            **{**IDS, "decoder_start_token_id": 2},
        },
        "seq2seq",
        attention=separate("prophetnet.encoder.layers.*.self_attn", "query_proj key_proj value_proj out_proj")
        + separate("prophetnet.decoder.layers.*.self_attn", "query_proj key_proj value_proj out_proj")
        + separate("prophetnet.decoder.layers.*.cross_attn", "query_proj key_proj value_proj out_proj"),
        mlp=names("prophetnet.encoder.layers.*.feed_forward", "intermediate output")
        | names("prophetnet.decoder.layers.*.feed_forward", "intermediate output"),
        other=names("prophetnet.decoder.layers.*.self_attn", "relative_pos_embeddings"),
        doubts=(
            Doubt(
                "attn",
                "prophetnet.decoder.layers.*.self_attn.relative_pos_embeddings",
                "a linear map of the attention block that makes biases of positions",
            ),
        ),
    ),
    "led": case(
        "LEDForConditionalGeneration",
        "LEDConfig",
        {
            **{**D_MODEL, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
            "attention_window": 4,
        },
        "seq2seq, global",
        attention=separate(
            "led.encoder.layers.*.self_attn",
            "longformer_self_attn.query longformer_self_attn.key longformer_self_attn.value output",
        )
        + Attention(
            names("led.encoder.layers.*.self_attn.longformer_self_attn", "query_global key_global value_global"),
            names("led.encoder.layers.*.self_attn.longformer_self_attn", "query_global value_global"),
        )
        + separate("led.decoder.layers.*.self_attn", OUT)
        + separate("led.decoder.layers.*.encoder_attn", OUT),
        mlp=names("led.encoder.layers.*", "fc1 fc2") | names("led.decoder.layers.*", "fc1 fc2"),
    ),
    "whisper": case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**D_MODEL, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 64},
        "mel to text",
        attention=FAIRSEQ,
        mlp=FAIRSEQ_MLP,
    ),
    "speech_to_text": case(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **{**D_MODEL, "input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16},
            **{"max_source_positions": 32, "max_target_positions": 64},
        },
        "frames to text",
        attention=FAIRSEQ,
        mlp=FAIRSEQ_MLP,
    ),
    "speecht5": case(
        "SpeechT5ForSpeechToText",
        "SpeechT5Config",
        {**WAVE, "vocab_size": 99, "hidden_size": 32, **LAYERS, "pad_token_id": 0},
        "audio to text",
        attention=separate("speecht5.encoder.wrapped_encoder.layers.*.attention", OUT)
        + separate("speecht5.decoder.wrapped_decoder.layers.*.self_attn", OUT)
        + separate("speecht5.decoder.wrapped_decoder.layers.*.encoder_attn", OUT),
        mlp=names("speecht5.encoder.wrapped_encoder.layers.*.feed_forward", "intermediate_dense output_dense")
        | names("speecht5.decoder.wrapped_decoder.layers.*.feed_forward", "intermediate_dense output_dense"),
        other={"speecht5.encoder.prenet.feature_projection.projection": 1},
    ),
}


# Vision

SWIN_BLOCK = "encoder.layers.*.blocks.*"

VISION = {
    "vit": case(
        "ViTForImageClassification",
        "ViTConfig",
        {**IMAGE, **CLASSES},
        "image",
        attention=separate("vit.layers.*.attention"),
        mlp=names("vit.layers.*.mlp", "fc1 fc2"),
    ),
    "deit": case(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**IMAGE, **CLASSES},
        "image",
        attention=separate("deit.layers.*.attention"),
        mlp=names("deit.layers.*.mlp", "fc1 fc2"),
    ),
    "beit": case(
        "BeitForImageClassification",
        "BeitConfig",
        {**IMAGE, **CLASSES, "use_relative_position_bias": True},
        "image",
        attention=separate("beit.layers.*.attention"),
        mlp=names("beit.layers.*.mlp", "fc1 fc2"),
    ),
    "dinov2": case(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**IMAGE, **CLASSES, "mlp_ratio": 2},
        "image",
        attention=separate("dinov2.encoder.layer.*.attention"),
        mlp=names("dinov2.encoder.layer.*.mlp", "fc1 fc2"),
    ),
    "dinov2_giant": case(
        "Dinov2Model",
        "Dinov2Config",
        {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True},
        "image",
        attention=separate("encoder.layer.*.attention"),
        mlp=names("encoder.layer.*.mlp", GATED),
    ),
    "dinov3": case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**IMAGE, "use_gated_mlp": True, "num_register_tokens": 2},
        "image",
        attention=separate("model.layer.*.attention"),
        mlp=names("model.layer.*.mlp", GATED),
    ),
    "vit_mae": case(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **{**IMAGE, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1},
            **{"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "mask_ratio": 0.5},
        },
        "image, noise",
        attention=separate("vit.layers.*.attention") + separate("decoder.decoder_layers.*.attention", n=1),
        mlp=names("vit.layers.*.mlp", "fc1 fc2") | names("decoder.decoder_layers.*.mlp", "fc1 fc2", 1),
        other=names("decoder", "decoder_embed decoder_pred", 1),
        doubts=(Doubt("all", "decoder.decoder_pred", "the output head of the pretraining"),),
    ),
    "swin": case(
        "SwinForImageClassification",
        "SwinConfig",
        {**STAGES, **CLASSES, "image_size": 16, "patch_size": 2, "embed_dim": 16},
        "image",
        attention=separate(f"swin.{SWIN_BLOCK}.attention"),
        mlp=names(f"swin.{SWIN_BLOCK}.mlp", "fc1 fc2"),
        other={"swin.encoder.layers.*.downsample.reduction": 1},
    ),
    "swinv2": case(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {**STAGES, **CLASSES, "image_size": 16, "patch_size": 2, "embed_dim": 16},
        "image",
        attention=separate(f"swinv2.{SWIN_BLOCK}.attention", BERT),
        mlp=names(f"swinv2.{SWIN_BLOCK}", DENSE),
        other={
            "swinv2.encoder.layers.*.downsample.reduction": 1,
            f"swinv2.{SWIN_BLOCK}.attention.self.continuous_position_bias_mlp.*": 4,
        },
        doubts=(
            Doubt(
                "mlp",
                f"swinv2.{SWIN_BLOCK}.attention.self.continuous_position_bias_mlp.*",
                "an MLP by name, that makes the biases of positions",
            ),
        ),
    ),
    "segformer": case(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            **PYRAMID,
            **CLASSES,
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "decoder_hidden_size": 16,
        },
        "image",
        attention=separate("segformer.stages.*.blocks.*.attention"),
        mlp=names("segformer.stages.*.blocks.*.mlp", "fc1 fc2"),
        other={"decode_head.linear_projections.*.proj": 2},
        doubts=in_head("decode_head.linear_projections.*.proj"),
    ),
    "pvt": case(
        "PvtForImageClassification",
        "PvtConfig",
        {
            **{**PYRAMID, **CLASSES, "image_size": 32, "sequence_reduction_ratios": [2, 1]},
            **{"patch_sizes": [4, 2], "strides": [4, 2]},
        },
        "image32",
        attention=separate("pvt.encoder.block.*.*.attention", BERT),
        mlp=names("pvt.encoder.block.*.*.mlp", "dense1 dense2"),
    ),
    "hiera": case(
        "HieraForImageClassification",
        "HieraConfig",
        {
            **{**CLASSES, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2]},
            **{"patch_padding": [1, 1], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            **{"masked_unit_size": [2, 2], "masked_unit_attention": [True, False], "query_stride": [2, 2]},
            **{"num_query_pool": 1, "mlp_ratio": 2.0},
        },
        "image",
        attention=fused("hiera.encoder.stages.*.layers.*.attn", "qkv", "proj"),
        mlp=names("hiera.encoder.stages.*.layers.*.mlp", "fc1 fc2"),
        other={"hiera.encoder.stages.*.layers.*.proj": 1},
        doubts=(Doubt("attn mlp", "hiera.encoder.stages.*.layers.*.proj", "to the width of the next stage"),),
    ),
    "videomae": case(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**IMAGE, **CLASSES, "num_frames": 2, "tubelet_size": 2},
        "video",
        attention=separate("videomae.encoder.layer.*.attention", VIT),
        mlp=names("videomae.encoder.layer.*", DENSE),
    ),
    "timesformer": case(
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        {**IMAGE, **CLASSES, "num_frames": 2},
        "video",
        attention=fused("timesformer.encoder.layer.*.attention", "attention.qkv", "output.dense")
        + fused("timesformer.encoder.layer.*.temporal_attention", "attention.qkv", "output.dense"),
        mlp=names("timesformer.encoder.layer.*", DENSE),
        other=names("timesformer.encoder.layer.*", "temporal_dense"),
        doubts=(
            Doubt(
                "attn mlp",
                "timesformer.encoder.layer.*.temporal_dense",
                "a map between the attention over time and that over space",
            ),
        ),
    ),
    "mobilevit": case(  # three stages of transformers, with 2, 4 and 3 layers
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            **{**CLASSES, "image_size": 128, "patch_size": 2, "hidden_sizes": [16, 16, 16]},
            **{"neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "num_attention_heads": 2, "mlp_ratio": 2.0},
        },
        "image128",
        attention=separate("mobilevit.encoder.layer.*.transformer.layer.*.attention", VIT, 9),
        mlp=names("mobilevit.encoder.layer.*.transformer.layer.*", DENSE, 9),
    ),
    "yolos": case(
        "YolosForObjectDetection",
        "YolosConfig",
        {**IMAGE, **CLASSES, "image_size": [16, 16], "num_detection_tokens": 3},
        "image",
        attention=separate("vit.encoder.layer.*.attention", VIT),
        mlp=names("vit.encoder.layer.*", DENSE),
        other={"bbox_predictor.layers.*": 3},
        doubts=(Doubt("all", "bbox_predictor.layers.*", "an output head, though not of classes"),),
    ),
    "detr": case(
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **{"backbone_config": {**RESNET, "out_features": ["stage2"]}, "d_model": 32, **LAYERS},
            **{"num_queries": 3, **CLASSES},
        },
        "image32",
        attention=separate("model.encoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.encoder_attn"),
        mlp=names("model.encoder.layers.*.mlp", "fc1 fc2") | names("model.decoder.layers.*.mlp", "fc1 fc2"),
        other={"bbox_predictor.layers.*": 3},
        doubts=(Doubt("all", "bbox_predictor.layers.*", "an output head, though not of classes"),),
        idle="model.decoder.layers.0.self_attn.v_proj",  # its input is zero
    ),
    "deformable_detr": case(
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        {
            **{"backbone_config": {**RESNET, "out_features": ["stage1", "stage2"]}, "d_model": 32, **LAYERS},
            **{"num_feature_levels": 2, "num_queries": 3, **CLASSES},
        },
        "image32",
        attention=Attention(
            names("model.encoder.layers.*.self_attn", "value_proj output_proj")
            | names("model.decoder.layers.*.encoder_attn", "value_proj output_proj"),
            names("model.encoder.layers.*.self_attn", "value_proj")
            | names("model.decoder.layers.*.encoder_attn", "value_proj"),
        )
        + separate("model.decoder.layers.*.self_attn"),
        mlp=names("model.encoder.layers.*.mlp", "fc1 fc2") | names("model.decoder.layers.*.mlp", "fc1 fc2"),
        other=names("model.encoder.layers.*.self_attn", "sampling_offsets attention_weights")
        | names("model.decoder.layers.*.encoder_attn", "sampling_offsets attention_weights")
        | {"model.reference_points": 1, "bbox_embed.*.layers.*": 6},
        doubts=(
            Doubt(
                "attn qv",
                " ".join(
                    names("model.encoder.layers.*.self_attn", "sampling_offsets attention_weights")
                    | names("model.decoder.layers.*.encoder_attn", "sampling_offsets attention_weights")
                ),
                "they stand for queries and keys",
            ),
            Doubt(
                "all", "bbox_embed.*.layers.* class_embed.* model.reference_points", "output heads, by unusual names"
            ),
        ),
    ),
    "maskformer": case(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {
            **{"fpn_feature_size": 32, "mask_feature_size": 32, "backbone_config": SWIN},
            "decoder_config": {"model_type": "detr", "d_model": 32, **LAYERS, "num_queries": 3},
        },
        "image32",
        attention=separate(f"model.pixel_level_module.encoder.model.{SWIN_BLOCK}.attention", BERT, 4)
        + separate("model.transformer_module.decoder.layers.*.self_attn")
        + separate("model.transformer_module.decoder.layers.*.encoder_attn"),
        mlp=names(f"model.pixel_level_module.encoder.model.{SWIN_BLOCK}", DENSE, 4)
        | names("model.transformer_module.decoder.layers.*.mlp", "fc1 fc2"),
        other={
            "model.pixel_level_module.encoder.model.encoder.layers.*.downsample.reduction": 3,
            "mask_embedder.*.*": 3,
        },
        doubts=(Doubt("all", "class_predictor mask_embedder.*.*", "output heads, by unusual names"),),
        idle="model.transformer_module.decoder.layers.0.self_attn.v_proj",  # its input is zero
    ),
    "mask2former": case(  # deformable attention, nn.MultiheadAttention and separate projections in one model
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {
            **{"backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32},
            **{"encoder_feedforward_dim": 64, "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4},
            **{"dim_feedforward": 64, "num_queries": 3, **CLASSES},
        },
        "image32",
        attention=separate(f"model.pixel_level_module.encoder.swin.{SWIN_BLOCK}.attention", n=4)
        + Attention(
            names("model.pixel_level_module.decoder.encoder.layers.*.self_attn", "value_proj output_proj", 1),
            names("model.pixel_level_module.decoder.encoder.layers.*.self_attn", "value_proj", 1),
        )
        + separate("model.transformer_module.decoder.layers.*.self_attn", OUT, 3)
        + packed("model.transformer_module.decoder.layers.*.cross_attn", 3),
        mlp=names(f"model.pixel_level_module.encoder.swin.{SWIN_BLOCK}.mlp", "fc1 fc2", 4)
        | names("model.pixel_level_module.decoder.encoder.layers.*", "fc1 fc2", 1)
        | names("model.transformer_module.decoder.layers.*", "fc1 fc2", 3),
        other=names(
            "model.pixel_level_module.decoder.encoder.layers.*.self_attn", "sampling_offsets attention_weights", 1
        )
        | {
            "model.pixel_level_module.encoder.swin.encoder.layers.*.downsample.reduction": 3,
            "model.transformer_module.decoder.mask_predictor.mask_embedder.*.*": 3,
        },
        doubts=(
            Doubt(
                "attn qv",
                " ".join(
                    names(
                        "model.pixel_level_module.decoder.encoder.layers.*.self_attn",
                        "sampling_offsets attention_weights",
                    )
                ),
                "they stand for queries and keys",
            ),
            Doubt(
                "all",
                "class_predictor model.transformer_module.decoder.mask_predictor.mask_embedder.*.*",
                "output heads, by unusual names",
            ),
        ),
    ),
    "sam": case(
        "SamModel",
        "SamConfig",
        {
            "vision_config": {
                **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 64},
                **{"image_size": 32, "patch_size": 8, "output_channels": 16, "window_size": 2},
                **{"global_attn_indexes": [1], "num_pos_feats": 8},
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                **{"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
                "iou_head_hidden_dim": 16,
            },
        },
        "image, points",
        attention=fused("vision_encoder.layers.*.attn", "qkv", "proj")
        + separate("mask_decoder.transformer.layers.*.self_attn", OUT)
        + separate("mask_decoder.transformer.layers.*.cross_attn_token_to_image", OUT)
        + separate("mask_decoder.transformer.layers.*.cross_attn_image_to_token", OUT)
        + separate("mask_decoder.transformer.final_attn_token_to_image", OUT, 1),
        mlp=names("vision_encoder.layers.*.mlp", "lin1 lin2")
        | names("mask_decoder.transformer.layers.*.mlp", "lin1 lin2"),
        other=names("mask_decoder.output_hypernetworks_mlps.*", "proj_in layers.* proj_out", 4)
        | names("mask_decoder.iou_prediction_head", "proj_in layers.* proj_out", 1),
        doubts=(
            Doubt(
                "all",
                " ".join(
                    names("mask_decoder.output_hypernetworks_mlps.*", "proj_in layers.* proj_out")
                    | names("mask_decoder.iou_prediction_head", "proj_in layers.* proj_out")
                ),
                "output heads, by unusual names",
            ),
            Doubt(
                "mlp",
                " ".join(names("mask_decoder.output_hypernetworks_mlps.*", "proj_in layers.* proj_out")),
                "MLPs by name, outside of the blocks",
            ),
        ),
        idle=" ".join(  # of the single mask, when several are asked for
            names("mask_decoder.output_hypernetworks_mlps.0", "proj_in layers.0 proj_out", 1)
        ),
    ),
    "convnext": case(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {**CLASSES, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        "image32",
        mlp=names("convnext.encoder.stages.*.layers.*", "pwconv1 pwconv2"),
        doubts=(
            Doubt(
                "mlp",
                " ".join(names("convnext.encoder.stages.*.layers.*", "pwconv1 pwconv2")),
                "the MLP of a block, but of no transformer's",
            ),
        ),
    ),
    "resnet": case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {**CLASSES, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "image32",
        other={
            "resnet.embedder.embedder.convolution": 1,
            "resnet.encoder.stages.*.layers.*.shortcut.convolution": 2,
            "resnet.encoder.stages.*.layers.*.layer.*.convolution": 4,
        },
    ),
    "poolformer": case(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {
            **{**CLASSES, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32]},
            **{"patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0},
        },
        "image32",
        other={
            "poolformer.encoder.patch_embeddings.*.projection": 2,
            **names("poolformer.encoder.block.*.*.output", "conv1 conv2"),
        },
        doubts=(
            Doubt(
                "mlp",
                " ".join(names("poolformer.encoder.block.*.*.output", "conv1 conv2")),
                "convolutions of one pixel, a feed-forward by what they do",
            ),
        ),
    ),
}

# Audio, and series

FEED_FORWARD = "intermediate_dense output_dense"

AUDIO = {
    "wav2vec2": case(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        WAVE,
        "audio",
        attention=separate("wav2vec2.encoder.layers.*.attention", OUT),
        mlp=names("wav2vec2.encoder.layers.*.feed_forward", FEED_FORWARD),
        other={"wav2vec2.feature_projection.projection": 1},
    ),
    "wav2vec2_adapted": case(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**WAVE, "do_stable_layer_norm": True, "adapter_attn_dim": 8},
        "audio",
        attention=separate("wav2vec2.encoder.layers.*.attention", OUT),
        mlp=names("wav2vec2.encoder.layers.*.feed_forward", FEED_FORWARD),
        other={
            "wav2vec2.feature_projection.projection": 1,
            **names("wav2vec2.encoder.layers.*.adapter_layer", "linear_1 linear_2"),
        },
        doubts=(
            Doubt(
                "mlp all",
                " ".join(names("wav2vec2.encoder.layers.*.adapter_layer", "linear_1 linear_2")),
                "adapters of the architecture's own",
            ),
        ),
    ),
    "hubert": case(
        "HubertForSequenceClassification",
        "HubertConfig",
        {**WAVE, "classifier_proj_size": 16},
        "audio",
        attention=separate("hubert.encoder.layers.*.attention", OUT),
        mlp=names("hubert.encoder.layers.*.feed_forward", FEED_FORWARD),
        other={"hubert.feature_projection.projection": 1, "projector": 1},
        doubts=(Doubt("all", "projector", "new with the classifier, though no output head"),),
    ),
    "wavlm": case(
        "WavLMForCTC",
        "WavLMConfig",
        {**WAVE, "num_buckets": 8},
        "audio",
        attention=separate("wavlm.encoder.layers.*.attention", OUT),
        mlp=names("wavlm.encoder.layers.*.feed_forward", FEED_FORWARD),
        other={"wavlm.feature_projection.projection": 1, "wavlm.encoder.layers.*.attention.gru_rel_pos_linear": 2},
        doubts=(
            Doubt(
                "attn",
                "wavlm.encoder.layers.*.attention.gru_rel_pos_linear",
                "a linear map of the attention block that gates the biases of positions",
            ),
        ),
    ),
    "wav2vec2_conformer": case(
        "Wav2Vec2ConformerForCTC",
        "Wav2Vec2ConformerConfig",
        {**WAVE, "conv_depthwise_kernel_size": 3, "position_embeddings_type": "relative"},
        "audio",
        attention=separate("wav2vec2_conformer.encoder.layers.*.self_attn", "linear_q linear_k linear_v linear_out")
        + Attention(names("wav2vec2_conformer.encoder.layers.*.self_attn", "linear_pos"), {}),
        mlp=names("wav2vec2_conformer.encoder.layers.*.ffn1", FEED_FORWARD)
        | names("wav2vec2_conformer.encoder.layers.*.ffn2", FEED_FORWARD),
        other={"wav2vec2_conformer.feature_projection.projection": 1},
        doubts=(
            Doubt("attn", "wav2vec2_conformer.encoder.layers.*.self_attn.linear_pos", "keys of relative positions"),
        ),
    ),
    "wav2vec2_bert": case(
        "Wav2Vec2BertForCTC",
        "Wav2Vec2BertConfig",
        {
            **{"vocab_size": 30, **SIZES, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3},
            **{"left_max_position_embeddings": 4, "right_max_position_embeddings": 4, "apply_spec_augment": False},
        },
        "frames",
        attention=separate("wav2vec2_bert.encoder.layers.*.self_attn", "linear_q linear_k linear_v linear_out"),
        mlp=names("wav2vec2_bert.encoder.layers.*.ffn1", FEED_FORWARD)
        | names("wav2vec2_bert.encoder.layers.*.ffn2", FEED_FORWARD),
        other={"wav2vec2_bert.feature_projection.projection": 1},
    ),
    "ast": case(
        "ASTForAudioClassification",
        "ASTConfig",
        {
            **{**SIZES, **CLASSES, "patch_size": 4, "frequency_stride": 4, "time_stride": 4},
            **{"max_length": 16, "num_mel_bins": 8},
        },
        "mel",
        attention=separate("audio_spectrogram_transformer.layers.*.attention"),
        mlp=names("audio_spectrogram_transformer.layers.*.mlp", "fc1 fc2"),
    ),
    "clap": case(
        "ClapModel",
        "ClapConfig",
        {
            "text_config": TEXT,
            "audio_config": {
                **{"window_size": 4, "num_mel_bins": 8, "spec_size": 32, "hidden_size": 32, "patch_size": 4},
                **{"patch_stride": [4, 4], "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_hidden_layers": 2},
                **{"num_attention_heads": [2, 2], "num_classes": 3, "mlp_ratio": 2.0, "projection_dim": 16},
            },
            "projection_dim": 16,
        },
        "text + audio",
        attention=bert_attention("text_model.encoder.layer.*")
        + bert_attention("audio_model.audio_encoder.layers.*.blocks.*"),
        mlp=names("text_model.encoder.layer.*", DENSE) | names("audio_model.audio_encoder.layers.*.blocks.*", DENSE),
        other={
            "text_model.pooler.dense": 1,
            "audio_model.audio_encoder.layers.*.downsample.reduction": 1,
            **names("text_projection", "linear1 linear2", 1),
            **names("audio_projection", "linear1 linear2", 1),
        },
    ),
    "musicgen": case(
        "MusicgenForCausalLM",
        "MusicgenDecoderConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64},
            **{"num_codebooks": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0},
        },
        "codes",
        attention=separate("model.decoder.layers.*.self_attn", OUT)
        + separate("model.decoder.layers.*.encoder_attn", OUT),
        mlp=names("model.decoder.layers.*", "fc1 fc2"),
    ),
    "time_series_transformer": case(
        "TimeSeriesTransformerModel",
        "TimeSeriesTransformerConfig",
        {
            **{"prediction_length": 3, "context_length": 6, "lags_sequence": [1, 2], "num_time_features": 2},
            **{"d_model": 32, **LAYERS},
        },
        "series",
        attention=separate("encoder.layers.*.self_attn", OUT)
        + separate("decoder.layers.*.self_attn", OUT)
        + separate("decoder.layers.*.encoder_attn", OUT),
        mlp=names("encoder.layers.*", "fc1 fc2") | names("decoder.layers.*", "fc1 fc2"),
        other={"encoder.value_embedding.value_projection": 1, "decoder.value_embedding.value_projection": 1},
    ),
    "patchtst": case(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {
            **{"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "prediction_length": 3},
        },
        "patches of series",
        attention=separate("model.encoder.layers.*.self_attn", OUT),
        mlp={"model.encoder.layers.*.ff.*": 4},
        other={"model.encoder.embedder.input_embedding": 1},
        doubts=(Doubt("all", "head.projection", "the output head, named by its parent alone"),),
    ),
}

# Several modalities

CLIP_TEXT = {**TEXT, "bos_token_id": 1, "eos_token_id": 98, "pad_token_id": 0}
CLIP_MLP = names("text_model.encoder.layers.*.mlp", "fc1 fc2") | names("vision_model.encoder.layers.*.mlp", "fc1 fc2")

MULTIMODAL = {
    "clip": case(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": 16},
        "text, ended + image",
        attention=separate("text_model.encoder.layers.*.self_attn", OUT)
        + separate("vision_model.encoder.layers.*.self_attn", OUT),
        mlp=CLIP_MLP,
        other={"visual_projection": 1, "text_projection": 1},
    ),
    "siglip": case(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": TEXT, "vision_config": IMAGE},
        "text + image",
        attention=separate("text_model.encoder.layers.*.self_attn", OUT)
        + separate("vision_model.encoder.layers.*.self_attn", OUT)
        + packed("vision_model.head.attention", 1),
        mlp={**CLIP_MLP, **names("vision_model.head.mlp", "fc1 fc2", 1)},
        other={"text_model.head": 1},
        doubts=(Doubt("all", "text_model.head", "the projection of texts, called a head"),),
    ),
    "blip": case(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0},
            "vision_config": IMAGE,
            **{"projection_dim": 16, "image_text_hidden_size": 16},
        },
        "text + image",
        attention=fused("vision_model.encoder.layers.*.self_attn", "qkv", "projection")
        + bert_attention("text_decoder.bert.encoder.layer.*")
        + separate("text_decoder.bert.encoder.layer.*.crossattention", BERT),
        mlp=names("vision_model.encoder.layers.*.mlp", "fc1 fc2") | names("text_decoder.bert.encoder.layer.*", DENSE),
        other={"text_decoder.cls.predictions.transform.dense": 1},
    ),
    "blip_2": case(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": IMAGE,
            "qformer_config": {**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 2},
            "text_config": {
                **{"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2},
                **{"num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
            },
            **{"num_query_tokens": 3, "image_token_index": 98},
        },
        "3 tokens of an image",
        attention=fused("vision_model.encoder.layers.*.self_attn", "qkv", "projection")
        + separate("qformer.encoder.layer.*.attention", VIT)
        + separate("qformer.encoder.layer.*.crossattention", VIT, 1)
        + separate("language_model.model.decoder.layers.*.self_attn", OUT),
        mlp=names("vision_model.encoder.layers.*.mlp", "fc1 fc2")
        | names("qformer.encoder.layer.*", "intermediate_query.dense output_query.dense")
        | names("language_model.model.decoder.layers.*", "fc1 fc2"),
        other={"language_projection": 1},
    ),
    "vilt": case(
        "ViltForQuestionAnswering",
        "ViltConfig",
        {**BERT_CONFIG, **CLASSES, "image_size": 16, "patch_size": 8, "max_image_length": -1},
        "text + image, masked",
        attention=separate("vilt.encoder.layer.*.attention", VIT),
        mlp=names("vilt.encoder.layer.*", DENSE),
        other={"vilt.pooler.dense": 1},
    ),
    "git": case(  # its language model's head is called `output`
        "GitForCausalLM",
        "GitConfig",
        {**LM, "vision_config": IMAGE},
        "text + image",
        attention=separate("git.image_encoder.vision_model.encoder.layers.*.self_attn", OUT)
        + bert_attention("git.encoder.layer.*"),
        mlp=names("git.image_encoder.vision_model.encoder.layers.*.mlp", "fc1 fc2")
        | names("git.encoder.layer.*", DENSE),
        other={"git.visual_projection.visual_projection.*": 1},
        doubts=(Doubt("all", "output", "an output head, by a name that says little"),),
    ),
    "lxmert": case(
        "LxmertModel",
        "LxmertConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
            **{"max_position_embeddings": 64, "l_layers": 1, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 16},
        },
        "regions",
        attention=bert_attention("encoder.layer.*", n=1)
        + bert_attention("encoder.r_layers.*", n=1)
        + separate("encoder.x_layers.*.visual_attention", "att.query att.key att.value output.dense")
        + separate("encoder.x_layers.*.lang_self_att", BERT)
        + separate("encoder.x_layers.*.visn_self_att", BERT),
        mlp=names("encoder.layer.*", DENSE, 1)
        | names("encoder.r_layers.*", DENSE, 1)
        | names("encoder.x_layers.*", "lang_inter.dense lang_output.dense visn_inter.dense visn_output.dense"),
        other={"encoder.visn_fc.visn_fc": 1, "encoder.visn_fc.box_fc": 1, "pooler.dense": 1},
    ),
    "flava": case(
        "FlavaModel",
        "FlavaConfig",
        {
            **{"text_config": TEXT, "image_config": IMAGE, "multimodal_config": SIZES},
            **{"projection_dim": 16, "hidden_size": 32},
        },
        "text + image",
        attention=separate("text_model.encoder.layer.*.attention", VIT)
        + separate("image_model.encoder.layer.*.attention", VIT)
        + separate("multimodal_model.encoder.layer.*.attention", VIT),
        mlp=names("text_model.encoder.layer.*", DENSE)
        | names("image_model.encoder.layer.*", DENSE)
        | names("multimodal_model.encoder.layer.*", DENSE),
        other={
            "text_model.pooler.dense": 1,
            "image_model.pooler.dense": 1,
            "multimodal_model.pooler.dense": 1,
            **{"image_projection": 1, "text_projection": 1},
            **{"image_to_mm_projection": 1, "text_to_mm_projection": 1},
        },
        idle="image_projection text_projection",  # for the contrastive loss
    ),
    "llava": case(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model", "projection_dim": 16},
            **{"image_token_id": 98, "image_seq_length": 4, "vision_feature_layer": -1},
        },
        "4 tokens of an image",
        attention=separate("model.vision_tower.encoder.layers.*.self_attn", OUT)
        + separate("model.language_model.layers.*.self_attn"),
        mlp=names("model.vision_tower.encoder.layers.*.mlp", "fc1 fc2")
        | names("model.language_model.layers.*.mlp", GATED),
        other=names("model.multi_modal_projector", "linear_1 linear_2", 1),
    ),
    "paligemma": case(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {**GROUPED, "model_type": "gemma", "head_dim": 8},
            "vision_config": {
                **{**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
            },
            **{"projection_dim": 32, "image_token_index": 98, "pad_token_id": 0},
        },
        "4 tokens of an image",
        attention=separate("model.vision_tower.encoder.layers.*.self_attn", OUT)
        + separate("model.language_model.layers.*.self_attn"),
        mlp=names("model.vision_tower.encoder.layers.*.mlp", "fc1 fc2")
        | names("model.language_model.layers.*.mlp", GATED),
        other={"model.multi_modal_projector.linear": 1},
    ),
    "idefics": case(
        "IdeficsForVisionText2Text",
        "IdeficsConfig",
        {
            **{**TEXT, "additional_vocab_size": 2, "cross_layer_interval": 1, "qk_layer_norms": True},
            **{"use_resampler": True, "freeze_text_layers": False, "freeze_vision_layers": False},
            "vision_config": {**IMAGE, "embed_dim": 32},
            "perceiver_config": {
                **{"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8},
                "qk_layer_norms_perceiver": True,
            },
        },
        "idefics",
        attention=separate("model.vision_model.encoder.layers.*.self_attn", OUT)
        + separate("model.perceiver_resampler.blocks.*.*", "q_proj k_proj v_proj output_proj", 1)
        + LLAMA
        + separate("model.gated_cross_attn_layers.*.cross_attn"),
        mlp=names("model.vision_model.encoder.layers.*.mlp", "fc1 fc2")
        | names("model.perceiver_resampler.blocks.*.*", "fc c_proj", 1)
        | LLAMA_MLP
        | names("model.gated_cross_attn_layers.*.mlp", GATED),
    ),
    "idefics2": case(
        "Idefics2ForConditionalGeneration",
        "Idefics2Config",
        {
            **{"text_config": {**GROUPED, "model_type": "mistral"}, "vision_config": IMAGE, "image_token_id": 98},
            "perceiver_config": {
                **{"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4},
                **{"resampler_head_dim": 8, "num_key_value_heads": 2},
            },
        },
        "3 tokens of images",
        attention=separate("model.vision_model.encoder.layers.*.self_attn", OUT)
        + separate("model.connector.perceiver_resampler.layers.*.self_attn", n=1)
        + separate("model.text_model.layers.*.self_attn"),
        mlp=names("model.vision_model.encoder.layers.*.mlp", "fc1 fc2")
        | names("model.connector.perceiver_resampler.layers.*.mlp", GATED, 1)
        | names("model.text_model.layers.*.mlp", GATED),
        other=names("model.connector.modality_projection", GATED, 1),
        doubts=(
            Doubt(
                "mlp", " ".join(names("model.connector.modality_projection", GATED)), "an MLP, outside of the blocks"
            ),
        ),
    ),
    "mllama": case(  # a layer of self-attention, a layer of cross-attention
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {
                **{**GROUPED, "cross_attention_layers": [1]},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                **{"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4},
                **{"intermediate_size": 64, "vision_output_dim": 64, "image_size": 16, "patch_size": 8},
                **{"max_num_tiles": 2, "intermediate_layers_indices": [0]},
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            "image_token_index": 98,
        },
        "mllama",
        attention=separate("model.vision_model.transformer.layers.*.self_attn", n=1)
        + separate("model.vision_model.global_transformer.layers.*.self_attn", n=1)
        + separate("model.language_model.layers.*.self_attn", n=1)
        + separate("model.language_model.layers.*.cross_attn", n=1),
        mlp=names("model.vision_model.transformer.layers.*.mlp", "fc1 fc2", 1)
        | names("model.vision_model.global_transformer.layers.*.mlp", "fc1 fc2", 1)
        | names("model.language_model.layers.*.mlp", GATED),
        other={"model.multi_modal_projector": 1},
    ),
    "qwen2_vl": case(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**GROUPED, **MROPE},
            "vision_config": {**QWEN_VISION, "depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **QWEN_TOKENS,
        },
        "qwen2_vl",
        attention=fused("model.visual.blocks.*.attn", "qkv", "proj")
        + separate("model.language_model.layers.*.self_attn"),
        mlp=names("model.visual.blocks.*.mlp", "fc1 fc2") | names("model.language_model.layers.*.mlp", GATED),
        other={"model.visual.merger.mlp.*": 2},
        doubts=(Doubt("mlp", "model.visual.merger.mlp.*", "an MLP by name, outside of the blocks"),),
    ),
    "qwen2_5_vl": case(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**GROUPED, **MROPE},
            "vision_config": {
                **{**QWEN_VISION, "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64},
                **{"window_size": 16, "fullatt_block_indexes": [1]},
            },
            **QWEN_TOKENS,
        },
        "qwen2_vl",
        attention=fused("model.visual.blocks.*.attn", "qkv", "proj")
        + separate("model.language_model.layers.*.self_attn"),
        mlp=names("model.visual.blocks.*.mlp", GATED) | names("model.language_model.layers.*.mlp", GATED),
        other={"model.visual.merger.mlp.*": 2},
        doubts=(Doubt("mlp", "model.visual.merger.mlp.*", "an MLP by name, outside of the blocks"),),
    ),
}


# More that are unusual in one way or another

DELTA_NET = "a gated delta net is attention by name, and a recurrence by what it does"

UNUSUAL = {
    "bark": case(
        "BarkSemanticModel",
        "BarkSemanticConfig",
        {
            **{"input_vocab_size": 99, "output_vocab_size": 99, "hidden_size": 32},
            **{"num_layers": 2, "num_heads": 4, "block_size": 64},
        },
        attention=fused("layers.*.attn", "att_proj", "out_proj"),
        mlp=names("layers.*.mlp", "in_proj out_proj"),
    ),
    "luke": case(  # four maps to queries
        "LukeModel",
        "LukeConfig",
        {**TEXT, "entity_vocab_size": 20, "entity_emb_size": 16, "use_entity_aware_attention": True},
        "entities",
        attention=bert_attention("encoder.layer.*")
        + Attention(
            names("encoder.layer.*.attention.self", "w2e_query e2w_query e2e_query"),
            names("encoder.layer.*.attention.self", "w2e_query e2w_query e2e_query"),
        ),
        mlp=names("encoder.layer.*", DENSE),
        other={"entity_embeddings.entity_embedding_dense": 1, "pooler.dense": 1},
    ),
    "pix2struct": case(
        "Pix2StructForConditionalGeneration",
        "Pix2StructConfig",
        {
            "text_config": {
                **{"vocab_size": 99, "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            },
            "vision_config": {
                **{"hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"patch_embed_hidden_size": 24, "seq_len": 8},
            },
        },
        "patches to text",
        attention=separate("encoder.encoder.layer.*.attention", "query key value output")
        + separate("decoder.layer.*.self_attention.attention", "query key value output")
        + separate("decoder.layer.*.encoder_decoder_attention.attention", "query key value output"),
        mlp=names("encoder.encoder.layer.*.mlp", "wi_0 wi_1 wo")
        | names("decoder.layer.*.mlp.DenseReluDense", "wi_0 wi_1 wo"),
        other={"encoder.embeddings.patch_projection": 1},
    ),
    "moonshine": case(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0},
            **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
            **{"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4},
        },
        "long audio to text",
        attention=separate("model.encoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.encoder_attn"),
        mlp=names("model.encoder.layers.*.mlp", "fc1 fc2") | names("model.decoder.layers.*.mlp", "fc1 fc2"),
    ),
    "umt5": case(
        "UMT5ForConditionalGeneration",
        "UMT5Config",
        T5,
        "seq2seq",
        attention=T5_ATTENTION,
        mlp=names(f"{T5_BLOCKS[0]}.DenseReluDense", "wi_0 wi_1 wo")
        | names(f"{T5_BLOCKS[1]}.DenseReluDense", "wi_0 wi_1 wo"),
    ),
    "t5gemma": case(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"encoder": {**GROUPED, "head_dim": 8}, "decoder": {**GROUPED, "head_dim": 8}, "vocab_size": 99},
        "seq2seq",
        attention=separate("model.encoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.self_attn")
        + separate("model.decoder.layers.*.cross_attn"),
        mlp=names("model.encoder.layers.*.mlp", GATED) | names("model.decoder.layers.*.mlp", GATED),
    ),
    "bigbird_pegasus": case(
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        {**SEQ2SEQ, "attention_type": "original_full"},
        "seq2seq",
        attention=separate("model.encoder.layers.*.self_attn", "self.query self.key self.value output")
        + separate("model.decoder.layers.*.self_attn", OUT)
        + separate("model.decoder.layers.*.encoder_attn", OUT),
        mlp=FAIRSEQ_MLP,
    ),
    "trocr": case(
        "TrOCRForCausalLM",
        "TrOCRConfig",
        {
            **{"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
            **{"decoder_ffn_dim": 64, "max_position_embeddings": 64, "cross_attention_hidden_size": 32},
        },
        "text, encoded",
        attention=separate("model.decoder.layers.*.self_attn", OUT)
        + separate("model.decoder.layers.*.encoder_attn", OUT),
        mlp=names("model.decoder.layers.*", "fc1 fc2"),
    ),
    "vision_encoder_decoder": case(  # a ViT and a GPT-2
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {
            "encoder": {**IMAGE, "model_type": "vit"},
            "decoder": {**GPT, "model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
        },
        "image to text",
        attention=separate("encoder.layers.*.attention")
        + fused("decoder.transformer.h.*.attn", "c_attn", "c_proj")
        + Attention(
            names("decoder.transformer.h.*.crossattention", "q_attn c_attn c_proj"),
            names("decoder.transformer.h.*.crossattention", "q_attn c_attn.v"),
            {"decoder.transformer.h.*.crossattention.c_attn": "k v"},
        ),
        mlp=names("encoder.layers.*.mlp", "fc1 fc2") | names("decoder.transformer.h.*.mlp", "c_fc c_proj"),
        other={"encoder.pooler.dense": 1},
        idle="encoder.pooler.dense",
    ),
    "doge": case(
        "DogeForCausalLM",
        "DogeConfig",
        GROUPED,
        attention=LLAMA,
        mlp=LLAMA_MLP,
        other=names(SELF, "dt_proj"),
        doubts=(Doubt("attn", f"{SELF}.dt_proj", "a linear map of the attention block that makes its mask"),),
    ),
    "glm4_moe": case(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **{**GROUPED, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
            **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        },
        attention=LLAMA,
        mlp=names(MLP, GATED, 1) | names(f"{MLP}.experts", EXPERTS, 1) | names(f"{MLP}.shared_experts", GATED, 1),
    ),
    "ernie4_5_moe": case(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **{**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
            **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        },
        attention=LLAMA,
        mlp=names(MLP, GATED, 1) | names(f"{MLP}.experts", EXPERTS, 1) | names(f"{MLP}.shared_experts", GATED, 1),
    ),
    "longcat_flash": case(  # two attentions and two MLPs in a layer, in lists
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **{**TEXT, "num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "n_routed_experts": 4},
            **{"moe_topk": 2, "zero_expert_num": 2, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4},
        },
        attention=Attention(
            names(f"{SELF}.*", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
            names(f"{SELF}.*", "q_a_proj q_b_proj kv_b_proj.v"),
            {f"{SELF}.*.kv_b_proj": "4 x k v"},
        ),
        mlp=names("model.layers.*.mlps.*", GATED) | names(f"{MLP}.experts", EXPERTS, 1),
        doubts=(Doubt("qv", f"{SELF}.*.q_a_proj", "it makes the latent of the queries, not the queries"),),
    ),
    "granitemoehybrid": case(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **{**GROUPED, **LOCAL, **SSM, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]},
            **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
        },
        attention=separate(SELF, n=1),
        mlp=names("model.layers.*.block_sparse_moe.experts", EXPERTS)
        | names("model.layers.*.shared_mlp", "input_linear output_linear"),
        other=names("model.layers.*.mamba", "in_proj out_proj", 1),
    ),
    "qwen3_5": case(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **{**GROUPED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "layer_types": ["linear_attention", "full_attention"],
        },
        attention=separate(SELF, n=1) + fused("model.layers.*.linear_attn", "in_proj_qkv", "out_proj", "q k v2", 1),
        mlp=LLAMA_MLP,
        other=names("model.layers.*.linear_attn", "in_proj_z in_proj_b in_proj_a", 1),
        doubts=(
            Doubt(
                "attn qv",
                " ".join(
                    names(
                        "model.layers.*.linear_attn",
                        "in_proj_qkv in_proj_qkv.q in_proj_qkv.v in_proj_z in_proj_b in_proj_a out_proj",
                    )
                ),
                DELTA_NET,
            ),
        ),
    ),
    "gemma4": case(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **{**GROUPED, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0},
            **{"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        attention=LLAMA,
        mlp=LLAMA_MLP,
        other={
            **names("model.layers.*", "per_layer_input_gate per_layer_projection"),
            "model.per_layer_model_projection": 1,
        },
        doubts=(
            Doubt(
                "mlp",
                " ".join(names("model.layers.*", "per_layer_input_gate per_layer_projection")),
                "a third part of the block, after the MLP",
            ),
        ),
    ),
    "diffllama": case("DiffLlamaForCausalLM", "DiffLlamaConfig", GROUPED, attention=LLAMA, mlp=LLAMA_MLP),
    "xlstm": case(
        "xLSTMForCausalLM",
        "xLSTMConfig",
        {
            **{"vocab_size": 99, "hidden_size": 32, "embedding_dim": 32, "num_blocks": 2, "num_heads": 4},
            **{"chunk_size": 8, "use_cache": False},
        },
        mlp=names("backbone.blocks.*.ffn", "proj_up_gate proj_up proj_down"),
        other=names("backbone.blocks.*.mlstm_layer", "q k v ogate_preact igate_preact fgate_preact out_proj"),
        doubts=(
            Doubt(
                "attn qv",
                " ".join(names("backbone.blocks.*.mlstm_layer", "q k v out_proj")),
                "queries, keys and values of a recurrence",
            ),
        ),
    ),
    "focalnet": case(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {
            **{**CLASSES, "image_size": 16, "patch_size": 2, "embed_dim": 16, "hidden_sizes": [16, 32]},
            **{"depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "mlp_ratio": 2.0},
        },
        "image",
        mlp=names("focalnet.encoder.stages.*.layers.*.mlp", "fc1 fc2"),
        other=names("focalnet.encoder.stages.*.layers.*.modulation", "projection_in projection_out"),
    ),
    "levit": case(  # linear maps with BatchNorm; keys and values together where it shrinks
        "LevitForImageClassification",
        "LevitConfig",
        {
            **{**CLASSES, "image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2]},
            **{"depths": [1, 1, 1], "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]},
        },
        "image64",
        attention=fused(
            "levit.encoder.stages.*.layers.*.module", "queries_keys_values.linear", "projection.linear", "2 x q k v2", 3
        )
        + Attention(
            names("levit.encoder.stages.*.layers.*", "queries.linear keys_values.linear projection.linear"),
            names("levit.encoder.stages.*.layers.*", "queries.linear keys_values.linear.v"),
            {"levit.encoder.stages.*.layers.*.keys_values.linear": "2 x k v4"},
        ),
        mlp=names("levit.encoder.stages.*.layers.*.module", "linear_up.linear linear_down.linear", 5),
    ),
    "timesfm": case(
        "TimesFmModelForPrediction",
        "TimesFmConfig",
        {**{**SIZES, "patch_length": 4, "context_length": 16, "horizon_length": 4, "head_dim": 8}},
        "list of series",
        attention=separate("decoder.layers.*.self_attn"),
        mlp=names("decoder.layers.*.mlp", "gate_proj down_proj"),
        other=names("decoder.input_ff_layer", "input_layer output_layer residual_layer", 1)
        | names("horizon_ff_layer", "input_layer output_layer residual_layer", 1),
        doubts=(
            Doubt(
                "mlp",
                " ".join(
                    names("decoder.input_ff_layer", "input_layer output_layer residual_layer")
                    | names("horizon_ff_layer", "input_layer output_layer residual_layer")
                ),
                "feed-forward by name, outside of the blocks",
            ),
            Doubt(
                "all",
                " ".join(names("horizon_ff_layer", "input_layer output_layer residual_layer")),
                "an output head, by an unusual name",
            ),
        ),
    ),
    "informer": case(
        "InformerModel",
        "InformerConfig",
        {
            **{"prediction_length": 3, "context_length": 6, "lags_sequence": [1, 2], "num_time_features": 2},
            **{"d_model": 32, **LAYERS},
        },
        "series",
        attention=separate("encoder.layers.*.self_attn", OUT)
        + separate("decoder.layers.*.self_attn", OUT)
        + separate("decoder.layers.*.encoder_attn", OUT),
        mlp=names("encoder.layers.*", "fc1 fc2") | names("decoder.layers.*", "fc1 fc2"),
        other={"encoder.value_embedding.value_projection": 1, "decoder.value_embedding.value_projection": 1},
    ),
    "kosmos2": case(
        "Kosmos2ForConditionalGeneration",
        "Kosmos2Config",
        {
            "text_config": {
                **{"vocab_size": 99, "embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 64},
                "max_position_embeddings": 64,
            },
            **{"vision_config": IMAGE, "latent_query_num": 3},
        },
        "text with a place for an image",
        attention=separate("text_model.model.layers.*.self_attn", OUT)
        + separate("vision_model.model.encoder.layers.*.self_attn", OUT)
        + separate("image_to_text_projection.x_attn", OUT, 1),
        mlp=names("text_model.model.layers.*.ffn", "fc1 fc2")
        | names("vision_model.model.encoder.layers.*.mlp", "fc1 fc2"),
        other={"image_to_text_projection.dense": 1},
    ),
    "smolvlm": case(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            **{"vision_config": IMAGE, "scale_factor": 2, "image_token_id": 98},
        },
        "1 token of images",
        attention=separate("model.vision_model.encoder.layers.*.self_attn", OUT)
        + separate("model.text_model.layers.*.self_attn"),
        mlp=names("model.vision_model.encoder.layers.*.mlp", "fc1 fc2") | names("model.text_model.layers.*.mlp", GATED),
        other={"model.connector.modality_projection.proj": 1},
    ),
    "internvl": case(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "vision_config": {**SIZES, "image_size": [16, 16], "patch_size": [4, 4]},
            **{"image_token_id": 98, "image_seq_length": 4},
        },
        "4 tokens of an image",
        attention=separate("model.vision_tower.encoder.layer.*.attention", "q_proj k_proj v_proj projection_layer")
        + separate("model.language_model.layers.*.self_attn"),
        mlp=names("model.vision_tower.encoder.layer.*.mlp", "fc1 fc2")
        | names("model.language_model.layers.*.mlp", GATED),
        other=names("model.multi_modal_projector", "linear_1 linear_2", 1),
    ),
}

CASES: dict[str, Case] = DECODERS | RECURRENT | ENCODERS | TRANSLATORS | VISION | AUDIO | MULTIMODAL | UNUSUAL
