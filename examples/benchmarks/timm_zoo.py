"""What LoRA presets choose on timm's models, against expectations written by hand, and that the numbers are right.

It needs timm and torchvision, no network and no weights: every model is random and as small as timm lets it be.

    python examples/benchmarks/timm_zoo.py                          # on CUDA if there is a GPU
    python examples/benchmarks/timm_zoo.py --out timm_zoo.md        # the same table in a dated file, too
    python examples/benchmarks/timm_zoo.py swin hiera --device cpu  # those whose names hold one of these
    PYTHONPATH=. python examples/benchmarks/timm_zoo.py             # where lightning_lora is not installed

The expectations come from timm's source; they know nothing of lightning_lora.

    "attn"   every query, key, value and output projection of every attention block
    "qv"     queries and values; `<module>.q` and `<module>.v` are slices of a fused map, `rows` says which
    "mlp"    every linear map of the feed-forward of every block, and what else is called an MLP
    "all"    every linear map but output heads; where there is none, every convolution
    None     there is no such layer: an error

A pointwise convolution is no linear map. Names are folded: every part that is a number is `*`, and the count says how
many modules have that folded name. Where experts could disagree, a `Doubt` says about what: there, either answer will
do. Each preset is then tried in fp32, in eval mode, on two images: it starts as the base, bit for bit (on a GPU to
1e-6: which product is made there depends on what asks for gradients); with a random B every adapter has a gradient and
the output moves; merged it is the same, and only what was adapted changed; unmerged it has every bit of the base. The
exit status is 1 if anything differs.
"""

import argparse
import copy
import datetime
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, unmerge_lora

PRESETS = ("attn", "qv", "mlp", "all")
START = {"cpu": 0.0, "cuda": 1e-6}
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-5}
Counts = dict[str, int]


# What a case is


@dataclass(frozen=True)
class Doubt:
    """In these presets, `names` may be chosen or not."""

    presets: str
    names: str
    why: str


@dataclass(frozen=True)
class Attention:
    """What "attn" and "qv" mean, and how the output rows of a fused map are laid out.

    `rows` has patterns for full names. "q k v" means thirds; "q16 k16 v32" that many rows, again and again, a run for
    each head.
    """

    attn: Counts
    qv: Counts
    rows: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: "Attention") -> "Attention":
        return Attention(add(self.attn, other.attn), add(self.qv, other.qv), self.rows | other.rows)


@dataclass(frozen=True)
class Case:
    """A model, its image size, and what each preset should choose in it."""

    model: str
    small: dict[str, Any]
    size: int
    expected: dict[str, Counts]
    rows: dict[str, str]
    doubts: tuple[Doubt, ...]


def case(
    model: str,
    size: int,
    attention: Attention | None = None,
    mlp: Counts | None = None,
    other: Counts | None = None,
    doubts: tuple[Doubt, ...] = (),
    **small: Any,
) -> Case:
    """`other` is what "all" chooses beyond attention and feed-forward."""
    attention = attention or Attention({}, {})
    everything = add(add(attention.attn, mlp or {}), other or {})
    expected = {"attn": attention.attn, "qv": attention.qv, "mlp": mlp or {}, "all": everything}
    return Case(model, small, size, expected, attention.rows, doubts)


def add(one: Counts, other: Counts) -> Counts:
    return dict(Counter(one) + Counter(other))


def names(module: str, leaves: str, n: int) -> Counts:
    return {f"{module}.{leaf}": n for leaf in leaves.split()}


def fused(module: str, n: int, out: str = "proj", rows: str = "q k v", qkv: str = "qkv") -> Attention:
    """One map for query, key and value, and the output projection."""
    return Attention(names(module, f"{qkv} {out}", n), names(module, f"{qkv}.q {qkv}.v", n), {f"{module}.{qkv}": rows})


def half_fused(module: str, n: int, q: str = "q", kv: str = "kv", out: str = "proj", rows: str = "k v") -> Attention:
    """A map for the query, one for key and value, and the output projection."""
    return Attention(names(module, f"{q} {kv} {out}", n), names(module, f"{q} {kv}.v", n), {f"{module}.{kv}": rows})


def separate(module: str, n: int, leaves: str = "q k v proj") -> Attention:
    """Four maps: query, key, value, output, in this order."""
    query, _, value, _ = leaves.split()
    return Attention(names(module, leaves, n), names(module, f"{query} {value}", n))


def fc(module: str, n: int) -> Counts:
    return names(module, "fc1 fc2", n)


def residual(stage: str, n: int, convolutions: int) -> Counts:
    """The convolutions of a stage of a ResNet with `n` blocks."""
    return names(stage, " ".join(f"*.conv{i + 1}" for i in range(convolutions)), n)


# The models. Sizes are such that no attention sees a single token, as its queries and keys would then be idle.

POSITIONS = "an MLP by name, that makes the biases of positions"
WIDTH = "between two widths, in the block but neither attention nor feed-forward"
NO_TRANSFORMER = "the MLP of a block, but of no transformer's"
VIT = fused("blocks.*.attn", 2)
VIT_MLP = fc("blocks.*.mlp", 2)
SWIN = "layers.*.blocks.*"
STAGE = "stages.*.blocks.*"

TRANSFORMERS = [
    case("vit_tiny_patch16_224", 32, VIT, VIT_MLP, img_size=32, depth=2),
    case("deit_tiny_patch16_224", 32, VIT, VIT_MLP, img_size=32, depth=2),
    case("deit_tiny_distilled_patch16_224", 32, VIT, VIT_MLP, img_size=32, depth=2),  # two heads
    case(  # two attentions and two MLPs in a block
        "vit_small_patch16_18x2_224",
        32,
        fused("blocks.*.attns.*.attn", 4),
        fc("blocks.*.ffns.*.mlp", 4),
        img_size=32,
        depth=2,
    ),
    case(  # a pooling by attention, with one map for key and value
        "vit_base_patch16_siglip_224",
        32,
        VIT + half_fused("attn_pool", 1),
        VIT_MLP | fc("attn_pool.mlp", 1),
        **{"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 4},
    ),
    case(  # patches by a linear map
        "naflexvit_base_patch16_gap",
        64,
        VIT,
        VIT_MLP,
        {"embeds.proj": 1},
        **{"depth": 2, "embed_dim": 96, "num_heads": 4},
    ),
    case(  # gated MLP, convolutions before
        "vitamin_small_224", 64, VIT, names("blocks.*.mlp", "w0 w1 w2", 2), img_size=64, depth=2
    ),
    case(  # its forward reads the weight of qkv
        "beit_base_patch16_224", 32, VIT, VIT_MLP, img_size=32, depth=2, embed_dim=96, num_heads=4
    ),
    case("eva02_tiny_patch14_224", 28, VIT, VIT_MLP, img_size=28, depth=2),
    case(
        "eva02_base_patch14_224",
        28,
        separate("blocks.*.attn", 2, "q_proj k_proj v_proj proj"),
        names("blocks.*.mlp", "fc1_g fc1_x fc2", 2),
        **{"img_size": 28, "depth": 2, "embed_dim": 96, "num_heads": 4},
    ),
    case(
        "cait_xxs24_224",
        32,
        VIT + separate("blocks_token_only.*.attn", 2) + Attention(names("blocks.*.attn", "proj_l proj_w", 2), {}),
        VIT_MLP | fc("blocks_token_only.*.mlp", 2),
        None,
        (Doubt("attn", "blocks.*.attn.proj_l blocks.*.attn.proj_w", "they mix heads, not features"),),
        **{"img_size": 32, "depth": 2},
    ),
    case(  # attention among channels
        "xcit_nano_12_p16_224",
        32,
        VIT + separate("cls_attn_blocks.*.attn", 2),
        VIT_MLP | fc("cls_attn_blocks.*.mlp", 2),
        img_size=32,
        depth=2,
    ),
    case(  # two branches, two heads
        "crossvit_tiny_240",
        240,
        fused("blocks.*.blocks.*.*.attn", 6) + separate("blocks.*.fusion.*.attn", 4, "wq wk wv proj"),
        fc("blocks.*.blocks.*.*.mlp", 6),
        names("blocks.*", "projs.*.* revert_projs.*.*", 4),
        (Doubt("attn mlp", "blocks.*.projs.*.* blocks.*.revert_projs.*.*", WIDTH),),
        depth=((1, 2, 0), (1, 2, 0)),
    ),
    case(  # a transformer of pixels in one of patches, with one map for query and key
        "tnt_s_patch16_224",
        64,
        Attention(
            names("blocks.*", "attn_in.qk attn_in.v attn_in.proj attn_out.qk attn_out.v attn_out.proj", 2),
            names("blocks.*", "attn_in.qk.q attn_in.v attn_out.qk.q attn_out.v", 2),
            {"blocks.*.attn_*.qk": "q k"},
        ),
        fc("blocks.*.mlp_in", 2) | VIT_MLP,
        {"proj": 1, "blocks.*.proj": 2},
        (Doubt("attn mlp", "blocks.*.proj", WIDTH),),
        **{"img_size": 64, "depth": 2},
    ),
    case(  # three blocks with one map for query and key, then one with a map for all
        "convit_tiny",
        32,
        Attention(
            names("blocks.*.attn", "qk v pos_proj proj", 3),
            names("blocks.*.attn", "qk.q v", 3),
            {"blocks.*.attn.qk": "q k"},
        )
        + fused("blocks.*.attn", 1),
        fc("blocks.*.mlp", 4),
        None,
        (Doubt("attn", "blocks.*.attn.pos_proj", "it makes attention from positions"),),
        **{"img_size": 32, "depth": 4, "local_up_to_layer": 3},
    ),
    case(
        "pit_ti_224",
        64,
        fused("transformers.*.blocks.*.attn", 12),
        fc("transformers.*.blocks.*.mlp", 12),
        {"transformers.*.pool.fc": 2},
        img_size=64,
    ),
    case(
        "nest_tiny",
        64,
        fused("levels.*.transformer_encoder.*.attn", 12),
        fc("levels.*.transformer_encoder.*.mlp", 12),
        img_size=64,
    ),
    case(  # four blocks whose attention has values alone, fourteen plain ones, two for the class token
        "volo_d1_224",
        64,
        fused("network.*.*.attn", 14)
        + Attention(names("network.*.*.attn", "v attn proj", 4), {"network.*.*.attn.v": 4})
        + half_fused("post_network.*.attn", 2),
        fc("network.*.*.mlp", 18) | fc("post_network.*.mlp", 2),
        None,
        (Doubt("attn qv", "network.*.*.attn.attn", "it stands for queries and keys"),),
        img_size=64,
    ),
]

PYRAMIDS = [
    case(
        "swin_tiny_patch4_window7_224",
        64,
        fused(f"{SWIN}.attn", 5),
        fc(f"{SWIN}.mlp", 5),
        {"layers.*.downsample.reduction": 3},
        **{"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    ),
    case(
        "swinv2_tiny_window8_256",
        64,
        fused(f"{SWIN}.attn", 5),
        fc(f"{SWIN}.mlp", 5),
        {"layers.*.downsample.reduction": 3, f"{SWIN}.attn.cpb_mlp.*": 10},
        (Doubt("mlp", f"{SWIN}.attn.cpb_mlp.*", POSITIONS),),
        **{"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    ),
    case("pvt_v2_b0", 64, half_fused(f"{STAGE}.attn", 8), fc(f"{STAGE}.mlp", 8)),
    case(  # attention in windows and over all, in turns
        "twins_svt_small",
        64,
        fused("blocks.*.*.attn", 9) + half_fused("blocks.*.*.attn", 9),
        fc("blocks.*.*.mlp", 18),
        **{"img_size": 64, "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)},
    ),
    case(
        "mvitv2_tiny",
        64,
        fused(f"{STAGE}.attn", 10),
        fc(f"{STAGE}.mlp", 10),
        {f"{STAGE}.shortcut_proj_attn": 3},
        (Doubt("attn mlp", f"{STAGE}.shortcut_proj_attn", WIDTH),),
        img_size=64,
    ),
    case(
        "hiera_tiny_224",
        64,
        fused("blocks.*.attn", 6),
        fc("blocks.*.mlp", 6),
        {"blocks.*.proj": 3},
        (Doubt("attn mlp", "blocks.*.proj", WIDTH),),
        **{"img_size": 64, "embed_dim": 32, "stages": (1, 2, 2, 1)},
    ),
    case(  # attention in windows and among channels, in turns
        "davit_tiny",
        64,
        fused("stages.*.blocks.*.*.attn", 8),
        fc("stages.*.blocks.*.*.mlp", 8),
        **{"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)},
    ),
    case(  # in every other block the query comes from elsewhere, and `qkv` holds key and value
        "gcvit_xxtiny",
        64,
        Attention(
            names(f"{STAGE}.attn", "qkv proj", 12),
            {f"{STAGE}.attn.qkv.q": 6, f"{STAGE}.attn.qkv.v": 12},
            {"stages.*.blocks.*[02468].attn.qkv": "q k v", "stages.*.blocks.*[13579].attn.qkv": "k v"},
        ),
        fc(f"{STAGE}.mlp", 12),
        img_size=64,
    ),
]

HYBRIDS = [  # convolutions and transformers
    case(  # linear maps with BatchNorm, and two heads
        "levit_128s",
        224,
        fused("stages.*.blocks.*.attn", 3, "proj.ln.linear", "q16 k16 v32", "qkv.linear")
        + half_fused("stages.*.downsample.attn_downsample", 2, "q.ln.linear", "kv.linear", "proj.ln.linear", "k16 v64"),
        names("stages.*.blocks.*.mlp", "ln1.linear ln2.linear", 3)
        | names("stages.*.downsample.mlp", "ln1.linear ln2.linear", 2),
        depth=(1, 1, 1),
    ),
    case("tiny_vit_5m_224", 224, fused(f"{STAGE}.attn", 10, rows="q32 k32 v32"), fc(f"{STAGE}.mlp", 10)),
    case(  # one block with attention, at the end; the MLPs of the others are convolutions
        "efficientformer_l1", 224, fused(f"{STAGE}.token_mixer", 1, rows="q32 k32 v128"), fc(f"{STAGE}.mlp", 1)
    ),
    case(  # convolutions, then attention; the head has a hidden map
        "caformer_s18",
        64,
        fused(f"{STAGE}.token_mixer", 12),
        fc(f"{STAGE}.mlp", 12),
        {"head.fc.fc1": 1},
        (Doubt("all", "head.fc.fc1", "a hidden map inside the output head"),),
    ),
    case(
        "coat_lite_tiny",
        64,
        sum((fused(f"serial_blocks{i}.*.factoratt_crpe", 2) for i in (1, 2, 3, 4)), Attention({}, {})),
        {name: n for i in (1, 2, 3, 4) for name, n in fc(f"serial_blocks{i}.*.mlp", 2).items()},
        img_size=64,
    ),
    case(  # query, key and value for each head
        "maxvit_rmlp_pico_rw_256",
        64,
        fused(f"{STAGE}.attn_block.attn", 11, rows="q32 k32 v32")
        + fused(f"{STAGE}.attn_grid.attn", 11, rows="q32 k32 v32"),
        fc(f"{STAGE}.attn_block.mlp", 11) | fc(f"{STAGE}.attn_grid.mlp", 11),
        fc(f"{STAGE}.attn_block.attn.rel_pos.mlp", 11) | fc(f"{STAGE}.attn_grid.attn.rel_pos.mlp", 11),
        (
            Doubt("mlp", " ".join(fc(f"{STAGE}.attn_block.attn.rel_pos.mlp", 11)), POSITIONS),
            Doubt("mlp", " ".join(fc(f"{STAGE}.attn_grid.attn.rel_pos.mlp", 11)), POSITIONS),
        ),
        img_size=64,
    ),
    case("mobilevit_xxs", 128, fused("stages.*.*.transformer.*.attn", 9), fc("stages.*.*.transformer.*.mlp", 9)),
    case(  # three blocks with attention among channels, nine of convolutions
        "edgenext_xx_small",
        64,
        fused(f"{STAGE}.xca", 3),
        fc(f"{STAGE}.mlp", 12),
        None,
        (Doubt("mlp", " ".join(fc(f"{STAGE}.mlp", 12)), NO_TRANSFORMER),),
    ),
    case("nextvit_small", 64, separate(f"{STAGE}.e_mhsa", 4)),  # its MLPs are convolutions
    case(  # attention with queries and keys alone
        "swiftformer_xs",
        64,
        Attention(names(f"{STAGE}.attn", "to_query to_key proj final", 4), names(f"{STAGE}.attn", "to_query", 4)),
        None,
        None,
        (Doubt("qv", f"{STAGE}.attn.to_key", "there are no values, and it stands in their place"),),
    ),
]

NO_ATTENTION = [
    case("mixer_s16_224", 64, None, fc("blocks.*.mlp_tokens", 8) | fc("blocks.*.mlp_channels", 8), img_size=64),
    case(
        "resmlp_12_224",
        64,
        None,
        fc("blocks.*.mlp_channels", 12),
        {"blocks.*.linear_tokens": 12},
        (Doubt("mlp", "blocks.*.linear_tokens", "the map over tokens, in an MLP's place"),),
        img_size=64,
    ),
    case(  # a gate that is no router
        "gmlp_s16_224",
        64,
        None,
        names("blocks.*.mlp_channels", "fc1 gate.proj fc2", 30),
        None,
        (Doubt("mlp", "blocks.*.mlp_channels.gate.proj", "the map over tokens, inside the MLP"),),
        img_size=64,
    ),
    case(  # LSTMs in the place of attention
        "sequencer2d_s",
        64,
        None,
        fc(f"{STAGE}.mlp_channels", 4),
        {f"{STAGE}.rnn_tokens.fc": 4},
        **{"img_size": 64, "layers": (1, 1, 1, 1)},
    ),
    case(
        "mambaout_femto",
        64,
        None,
        fc(STAGE, 4),
        {"head.pre_logits.fc": 1},
        (
            Doubt("mlp", " ".join(fc(STAGE, 4)), "fc1 and fc2, around the convolution of a gated block"),
            Doubt("all", "head.pre_logits.fc", "a hidden map inside the output head"),
        ),
        depths=(1, 1, 1, 1),
    ),
    case(
        "convnext_tiny",
        64,
        None,
        fc(f"{STAGE}.mlp", 5),
        None,
        (Doubt("mlp", " ".join(fc(f"{STAGE}.mlp", 5)), NO_TRANSFORMER),),
        **{"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    ),
]

CONVOLUTIONS = [
    case(
        "convnext_atto",
        64,
        other={"stem.*": 1, **names(STAGE, "conv_dw mlp.fc1 mlp.fc2", 5), "stages.*.downsample.*": 3},
        **{"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    ),
    case(
        "convnextv2_atto",
        64,
        other={"stem.*": 1, **names(STAGE, "conv_dw mlp.fc1 mlp.fc2", 5), "stages.*.downsample.*": 3},
        **{"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    ),
    case(
        "resnet18",
        64,
        other={
            "conv1": 1,
            **{name: n for i in (1, 2, 3, 4) for name, n in residual(f"layer{i}", 2, 2).items()},
            **{f"layer{i}.*.downsample.*": 1 for i in (2, 3, 4)},
        },
    ),
    case(
        "resnet50",
        64,
        other={
            "conv1": 1,
            **{name: n for i, b in enumerate((3, 4, 6, 3), 1) for name, n in residual(f"layer{i}", b, 3).items()},
            **{f"layer{i}.*.downsample.*": 1 for i in (1, 2, 3, 4)},
        },
    ),
    case(
        "efficientnet_b0",
        64,
        other={
            **{"conv_stem": 1, "conv_head": 1},
            **names("blocks.*.*", "conv_dw conv_pw se.conv_reduce se.conv_expand", 16),
            "blocks.*.*.conv_pwl": 15,
        },
    ),
    case(
        "mobilenetv3_small_100",
        64,
        other={
            **{"conv_stem": 1, "conv_head": 1, "blocks.*.*.conv": 1},
            **names("blocks.*.*", "conv_dw conv_pw", 11),
            **names("blocks.*.*", "se.conv_reduce se.conv_expand", 9),
            "blocks.*.*.conv_pwl": 10,
        },
    ),
    case(
        "poolformer_s12",
        64,
        other={"stem.conv": 1, "stages.*.downsample.conv": 3, **fc(f"{STAGE}.mlp", 12)},
    ),
    case(  # attention whose projections are convolutions
        "visformer_tiny",
        64,
        other={
            **{"stem.*": 1, "patch_embed1.proj": 1, "patch_embed2.proj": 1, "patch_embed3.proj": 1},
            **names("stage1.*", "mlp.conv1 mlp.conv2 mlp.conv3", 1),
            **names("stage2.*", "attn.qkv attn.proj mlp.conv1 mlp.conv3", 1),
            **names("stage3.*", "attn.qkv attn.proj mlp.conv1 mlp.conv3", 1),
        },
        **{"img_size": 64, "depth": (1, 1, 1)},
    ),
]

CASES: list[Case] = [*TRANSFORMERS, *PYRAMIDS, *HYBRIDS, *NO_ATTENTION, *CONVOLUTIONS]


# What was chosen


def fold(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def sites(model: nn.Module) -> list[str]:
    """The adapted matrices: modules, or `<module>.<part>`."""
    found = []
    for name, _ in lora_parameters(model):
        module, _, rest = name.partition(".lora.default.")
        part, _, matrix = rest.rpartition(".")
        if matrix == "A":
            found.append(f"{module}.{part}" if part else module)
    return found


def owners(model: nn.Module) -> set[str]:
    """The modules with adapters."""
    return {name.partition(".lora.default.")[0] for name, _ in lora_parameters(model)}


def misplaced(case: Case, preset: str, found: Counts) -> Iterator[str]:
    """Where the counts are not as expected."""
    expected = case.expected[preset]
    doubted = {name for doubt in case.doubts if preset in doubt.presets.split() for name in doubt.names.split()}
    for name in sorted((expected.keys() | found.keys()) - doubted):
        if expected.get(name, 0) != found.get(name, 0):
            yield f"`{name}` {found.get(name, 0)} times, not {expected.get(name, 0)}"


def query_and_value(layout: str, size: int) -> list[int]:
    """Which of the `size` output rows of a fused map are queries and values."""
    blocks = layout.split()
    run = "".join(block[0] * int(block[1:] or size // len(blocks)) for block in blocks)
    assert size % len(run) == 0, f"{size} rows cannot be {layout}"
    return [row for row in range(size) if run[row % len(run)] in "qv"]


# Whether the numbers are right


def build(case: Case, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The model in eval mode, and two images."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, pretrained=False, num_classes=10, **case.small).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a gate that starts at zero would switch its block off
            if parameter.numel() and (parameter - parameter.mean()).abs().max() < 1e-3:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device), torch.randn(2, 3, case.size, case.size).to(device)


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def randomize(model: nn.Module) -> None:
    """A B for every adapter, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model):
        if name.endswith(".B"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def idle(model: nn.Module, images: Tensor) -> list[str]:
    """The matrices that got no gradient."""
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no gradients in eval mode
        model(images).square().sum().backward()
    return [name for name, matrix in lora_parameters(model) if matrix.grad is None or not matrix.grad.any()]


def wrong_rows(case: Case, merged: nn.Module, base: nn.Module) -> Iterator[str]:
    """Fused maps in which other rows changed than those of query and value."""
    for name, module in merged.named_modules():
        layout = next((layout for pattern, layout in case.rows.items() if fnmatchcase(name, pattern)), None)
        if layout is not None:
            moved = (module.weight != base.get_submodule(name).weight).any(1).nonzero().flatten().tolist()
            if moved != query_and_value(layout, len(module.weight)):
                yield f"other rows of `{name}` changed than {layout}"


def wrong_numbers(case: Case, preset: str, model: nn.Module, base: nn.Module, images: Tensor) -> Iterator[str]:
    """What an adapted `model` computes that it should not; `base` is the model before."""
    frozen = copy.deepcopy(base).requires_grad_(False)  # torch may take another product for a weight without gradient
    plain, start = output(base, images), output(model, images)
    same = same_bits(start, plain) or same_bits(start, output(frozen, images))
    if not (same or distance(start, plain) < START[images.device.type]):
        yield f"starts {distance(start, plain):.0e} away from the base"
    randomize(model)
    without = idle(model, images)
    if without:
        yield f"no gradient for {len(without)} matrices, `{without[0]}` the first"
    live, adapted = output(model, images), owners(model)
    if not live.isfinite().all() or torch.allclose(live, plain, rtol=1e-3):
        yield "adapters do not change the output, or not to numbers"
    merge_lora(model)
    apart = distance(output(model, images), live)
    if not apart < TOLERANCE[images.device.type]:
        yield f"merged is {apart:.0e} away from unmerged"
    moved = changed(model, base) - {f"{name}.weight" for name in adapted}
    if moved:
        yield f"the merge changed {len(moved)} tensors that have no adapter, `{min(moved)}` one of them"
    if preset == "qv":
        yield from wrong_rows(case, model, base)
    unmerge_lora(model)
    left = changed(model, base)
    if left:
        yield f"unmerged, {len(left)} tensors are not the base's, `{min(left)}` one of them"


def changed(model: nn.Module, base: nn.Module) -> set[str]:
    """The tensors of the base that have other bits now."""
    now = model.state_dict()
    return {name for name, value in base.state_dict().items() if not same_bits(now[name], value)}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# The table


def check(case: Case, device: torch.device) -> tuple[dict[str, int], list[str]]:
    """How many matrices each preset adapts, and all that is not as it should be."""
    counts, wrong = {}, []
    base, images = build(case, device)
    for preset in PRESETS:
        model, refused = copy.deepcopy(base), ""
        try:
            apply_lora(model, LoRAConfig(r=2, targets=preset))
        except ValueError as error:
            refused = str(error)
        found = [] if refused else sites(model)
        counts[preset] = len(found)
        places = list(misplaced(case, preset, dict(Counter(map(fold, found)))))
        wrong += [f"{preset}: {one}" for one in ([refused] if refused and places else places)]
        if found:
            wrong += [f"{preset}: {one}" for one in wrong_numbers(case, preset, model, base, images)]
    return counts, wrong


def line(case: Case, device: torch.device) -> tuple[str, bool]:
    """A line of the table, and whether all is right."""
    try:
        counts, wrong = check(case, device)
    except Exception as error:  # one model that breaks should not hide the others
        counts, wrong = {}, [f"{type(error).__name__}: {error}"]
    result = " ".join("; ".join(wrong).replace("|", "/").split()) or "ok"
    cells = [f"{counts.get(preset) or '-':>5}" for preset in PRESETS]
    return " | ".join([f"| {case.model:<32}", *cells, f"{result} |"]), not wrong


def header(device: torch.device) -> list[str]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = f"timm {timm.__version__}, torch {torch.__version__}, lightning_lora {lightning_lora.__version__}"
    return [
        f"# LoRA presets on timm's models, {datetime.date.today()}",
        "",
        f"{where}; Python {platform.python_version()}, {versions}; fp32, TF32 off.",
        "",
        "Matrices that each preset adapts (- where it is an error, as it should be), and what differs from the",
        "expectations in `timm_zoo.py`.",
        "",
        " | ".join([f"| {'model':<32}", *(f"{preset:>5}" for preset in PRESETS), "result |"]),
        " | ".join([f"| {'-' * 32}", *["----:"] * len(PRESETS), "------ |"]),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a part of a model's name; all models if there is none"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a markdown file for the table")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    cases = [case for case in CASES if not asked.names or any(name in case.model for name in asked.names)]
    device = torch.device(asked.device)
    warnings.simplefilter("ignore")  # those of the models themselves
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    lines = header(device)
    print("\n".join(lines))
    right = []
    for case in cases:
        text, fine = line(case, device)
        print(text, flush=True)
        lines.append(text)
        right.append(fine)
    lines += ["", f"{sum(right)} of {len(right)} models as expected."]
    print("\n".join(lines[-2:]))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
