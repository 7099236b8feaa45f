"""Where attention, MLPs and blocks leave a module, against expectations written by hand from the models' code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_lora.targets.blocks import sublayers_in
from lightning_lora.targets.survey import Survey
from tests.helpers import models, zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the architectures themselves


@dataclass
class Expected:
    """Folded names: the outputs of attention, input and output of each MLP, and the blocks; a list has no repeats."""

    attention: str
    mlp: str
    blocks: str


HUGGING_FACE = {
    "gpt2": Expected("transformer.h.*.attn.c_proj", "transformer.h.*.mlp: c_fc c_proj", "transformer.h.*"),
    "llama": Expected("model.layers.*.self_attn.o_proj", "model.layers.*.mlp: gate_proj down_proj", "model.layers.*"),
    "bert_cross": Expected(
        "bert.encoder.layer.*.attention.output.dense bert.encoder.layer.*.crossattention.output.dense",
        "bert.encoder.layer.*: intermediate.dense output.dense",
        "bert.encoder.layer.*",
    ),
    "t5": Expected(
        "encoder.block.*.layer.*.SelfAttention.o decoder.block.*.layer.*.SelfAttention.o "
        "decoder.block.*.layer.*.EncDecAttention.o",
        "encoder.block.*.layer.*.DenseReluDense: wi wo; decoder.block.*.layer.*.DenseReluDense: wi wo",
        "encoder.block.* decoder.block.*",
    ),
    "wavlm": Expected(  # torch's function of attention reads the weight of `out_proj`
        "wavlm.encoder.layers.*.attention",
        "wavlm.encoder.layers.*.feed_forward: intermediate_dense output_dense",
        "wavlm.encoder.layers.*",
    ),
    "mixtral": Expected("model.layers.*.self_attn.o_proj", "model.layers.*.mlp", "model.layers.*"),
    "qwen3_moe": Expected(
        "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp: gate_proj down_proj; model.layers.*.mlp",
        "model.layers.*",
    ),
    "timesformer": Expected(
        "timesformer.encoder.layer.*.attention.output.dense "
        "timesformer.encoder.layer.*.temporal_attention.output.dense",
        "timesformer.encoder.layer.*: intermediate.dense output.dense",
        "timesformer.encoder.layer.*",
    ),
    "lxmert": Expected(
        "encoder.layer.*.attention.output.dense encoder.x_layers.*.visual_attention.output.dense "
        "encoder.x_layers.*.lang_self_att.output.dense encoder.x_layers.*.visn_self_att.output.dense "
        "encoder.r_layers.*.attention.output.dense",
        "encoder.layer.*: intermediate.dense output.dense; encoder.x_layers.*: lang_inter.dense lang_output.dense; "
        "encoder.x_layers.*: visn_inter.dense visn_output.dense; encoder.r_layers.*: intermediate.dense output.dense",
        "encoder.layer.* encoder.x_layers.* encoder.r_layers.*",
    ),
    "levit": Expected(
        "levit.encoder.stages.*.layers.*.module.projection.linear levit.encoder.stages.*.layers.*.projection.linear",
        "levit.encoder.stages.*.layers.*.module: linear_up.linear linear_down.linear",
        "levit.encoder.stages.*",
    ),
    "xlm": Expected("transformer.attentions.*.out_lin", "transformer.ffns.*: lin1 lin2", ""),
    "dbrx": Expected("transformer.blocks.*.norm_attn_norm.attn.out_proj", "", "transformer.blocks.*"),
    "convnext": Expected("", "convnext.encoder.stages.*.layers.*: pwconv1 pwconv2", ""),
}


def folded(sublayers):
    """The names of an :class:`Expected` as sets."""
    mlps = set()
    for sublayer in sublayers.mlp:
        first, last = zoo.fold(sublayer.input), zoo.fold(sublayer.output)
        mlps.add(last if first == last else (first, last))
    return {zoo.fold(s.output) for s in sublayers.attention}, mlps, {zoo.fold(s.output) for s in sublayers.blocks}


def expected_sets(expected):
    mlps = set()
    for entry in filter(None, expected.mlp.split("; ")):
        container, _, layers = entry.partition(": ")
        mlps.add(tuple(f"{container}.{layer}" for layer in layers.split()) if layers else container)
    return set(expected.attention.split()), mlps, set(expected.blocks.split())


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_sublayers_of_hugging_face(name):
    model, _ = zoo.build(zoo.CASES[name])
    assert folded(sublayers_in(Survey(model))) == expected_sets(HUGGING_FACE[name])


@pytest.mark.parametrize(
    ("name", "kind", "site", "words"),
    [
        ("squeezebert", "attention", "encoder.layers.0.attention.query", "has the name of an output projection"),
        ("jetmoe", "attention", "model.layers.0.self_attention.experts.output_linear", "experts of attention"),
        ("idefics", "blocks", "model.perceiver_resampler.blocks.0", "is a list of the parts of a block"),
    ],
)
def test_refusals(name, kind, site, words):
    model, _ = zoo.build(zoo.CASES[name])
    refused = [sublayer for sublayer in getattr(sublayers_in(Survey(model)), kind) if sublayer.refusal]
    assert {zoo.fold(sublayer.output) for sublayer in refused} == {zoo.fold(refused[0].output)}
    assert zoo.fold(site).rpartition(".")[0] == zoo.fold(refused[0].output).rpartition(".")[0]
    assert words in refused[0].refusal


def test_layers_of_torch():
    model = nn.Transformer(8, 2, 1, 1, 16)
    attention, mlps, blocks = folded(sublayers_in(Survey(model)))
    assert attention == {f"{side}.layers.*.self_attn" for side in ("encoder", "decoder")} | {
        "decoder.layers.*.multihead_attn"
    }
    assert mlps == {(f"{side}.layers.*.linear1", f"{side}.layers.*.linear2") for side in ("encoder", "decoder")}
    assert blocks == {"encoder.layers.*", "decoder.layers.*"}


def test_one_block_without_a_number():
    sublayers = sublayers_in(Survey(nn.ModuleDict({"body": nn.TransformerEncoderLayer(8, 2, 16)})))
    assert [sublayer.output for sublayer in sublayers.blocks] == ["body"]


def test_a_block_of_ones_own():
    sublayers = sublayers_in(Survey(models.Net()))
    assert [s.output for s in sublayers.attention] == ["layers.0.o", "layers.1.o"]
    assert [(s.input, s.output) for s in sublayers.mlp] == [("layers.0.mlp", "layers.0.mlp"), ("layers.1.mlp",) * 2]
    assert [(s.output, s.features) for s in sublayers.blocks] == [("layers.0", 16), ("layers.1", 16)]


class GateLast(nn.Module):
    """An MLP as Meta's Llama defines it: ``w2`` is the last layer that is called, and all are square."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


def test_a_gate_that_is_defined_last():
    block = nn.ModuleDict({"attention": models.Attention(), "feed_forward": GateLast()})
    (mlp,) = sublayers_in(Survey(nn.ModuleDict({"layers": nn.ModuleList([block])}))).mlp
    assert (mlp.input, mlp.output) == ("layers.0.feed_forward.w1", "layers.0.feed_forward.w2")


def test_features_of_convolutions_are_channels():
    block = nn.ModuleDict({"attn": models.Attention(8), "fc1": nn.Conv2d(8, 16, 1), "fc2": nn.Conv2d(16, 8, 1)})
    (mlp,) = sublayers_in(Survey(nn.ModuleDict({"blocks": nn.ModuleList([block])}))).mlp
    assert (mlp.output, mlp.features, mlp.channel_dim) == ("blocks.0.fc2", 8, -3)


def test_a_lazy_layer_has_no_features():
    block = nn.ModuleDict({"attn": models.Attention(8), "fc1": nn.LazyLinear(16), "fc2": nn.Linear(16, 8)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    (mlp,) = sublayers_in(Survey(model)).mlp
    assert mlp.refusal is not None
    assert "run one batch through the model first" in mlp.refusal
