"""What the words of `train` mean, on models as libraries build them; the oracle is a list written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import TuneConfig, adapt
from lightning_lora.methods.tune.method import TuneMethod
from lightning_lora.methods.tune.sites import is_norm
from tests.helpers.models import Attention, Encoder


def trained(model: nn.Module, *args: object, **kwargs: object) -> set[str]:
    adapt(model, TuneConfig(*args, **kwargs))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def every(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


class OwnRMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))


class ChannelNorm2d(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, d, 1, 1))


class NormalizedLinear(nn.Module):
    """No normalization layer, though it is called so: its weight is a matrix."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d, d))


class PreNorm(nn.Module):
    """It holds one, and has no parameter itself."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(d), nn.Linear(d, d)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.channels, self.no, self.pre = OwnRMSNorm(4), ChannelNorm2d(4), NormalizedLinear(4), PreNorm(4)
        self.bn, self.gn, self.plain = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4, elementwise_affine=False)
        self.rnn, self.attn = nn.GRU(4, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)


def test_biases_are_those_of_every_layer():
    biases = {"pre.norm.bias", "pre.fn.bias", "bn.bias", "gn.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"}
    biases |= {"attn.in_proj_bias", "attn.out_proj.bias"}
    assert trained(Mixed(), "bias") == biases


def test_norms_are_those_of_anybody():
    assert trained(Mixed(), "norm") == {
        *("own.scale", "channels.gamma", "pre.norm.weight", "pre.norm.bias"),
        *("bn.weight", "bn.bias", "gn.weight", "gn.bias"),
    }
    assert is_norm(nn.InstanceNorm2d(4)) and is_norm(nn.SyncBatchNorm(4)) and not is_norm(nn.Linear(4, 4))


def test_all_and_lists():
    model = Encoder()
    assert trained(model, "all") == every(model)
    assert trained(Encoder(), ["norm", "bn"]) == {n for n in every(model) if ".norm" in n or n.startswith("bn")}
    assert trained(Encoder(), ["q_proj.bias"]) == {f"layers.{n}.attn.q_proj.bias" for n in (0, 1)}
    assert trained(Encoder(), ["re:.*[.]1[.]mlp.*", "head"]) == {
        n for n in every(model) if ".1.mlp" in n or n.startswith("head.")
    }


def test_a_name_of_the_model_takes_precedence_over_a_word():
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "other": nn.LayerNorm(2)})
    assert trained(model, ["norm"]) == {"norm.weight", "norm.bias"}


def test_exclude_also_train_and_bias():
    model = Encoder()
    biases = {name for name in every(model) if name.endswith("bias")}
    assert trained(Encoder(), "bias", exclude=["layers.0", "head"]) == {
        name for name in biases if not name.startswith(("layers.0", "head"))
    }
    assert trained(Encoder(), "bias", also_train=["head"]) == biases | {"head.weight"}
    assert trained(Encoder(), "norm", bias="all") == biases | {n for n in every(model) if "norm" in n or "bn" in n}


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Encoder(), {"head.weight", "head.bias"}),
        (nn.ModuleDict({"body": nn.Conv2d(1, 2, 3), "fc": nn.Linear(2, 2)}), {"fc.weight", "fc.bias"}),
        (
            nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))}),
            {f"classifier.{n}.{key}" for n in (0, 1) for key in ("weight", "bias")},
        ),
    ],
    ids=["head", "last layer", "classifier of two layers"],
)
def test_the_head_is_trained_whole(model, head):
    assert trained(model, "head") == head


def test_a_tied_head_trains_what_it_is_tied_to():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5)})
    model["lm_head"].weight = model["embed"].weight
    assert trained(model, "head") == {"embed.weight", "lm_head.bias"}


def test_a_layer_with_two_names_is_named_by_either():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer, "rest": nn.Linear(2, 2)})
    assert trained(model, ["second"]) == {"first.weight", "first.bias"}


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.cls_head, self.box_head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 4)


class TwoTowers(nn.Module):
    """Two projections at the end, as of CLIP, that no name calls heads."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(Attention(4) for _ in range(2))
        self.picture, self.text = nn.Linear(4, 2), nn.Linear(4, 2)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (Bare(), {"train": "bias"}, r"found no bias in Bare\. Name what to train in a list, as in train=\['b'\]"),
        (Bare(), {"train": "norm"}, r"found no parameter of a normalization layer in Bare\. Name what"),
        (
            Encoder(),
            {"train": ["layers.7"]},
            r"`train` has 'layers\.7', which matches no module and no parameter\. The",
        ),
        (Encoder(), {"train": ["re:layer"]}, r"A `re:` pattern must match the whole name"),
        (Encoder(), {"train": ["layers.0.dropout"]}, r"names `layers\.0\.dropout`, and that has no parameter"),
        (
            Encoder(),
            {"train": "head", "exclude": ["head"]},
            r"means only parameters that `exclude=\['head'\]` takes out",
        ),
        (Encoder(), {"train": "bias", "exclude": ["nothing"]}, "`exclude` has 'nothing', which matches no module"),
        (
            Encoder(),
            {"train": "bias", "also_train": ["nothing"]},
            "`also_train` has 'nothing', which matches no module",
        ),
        (
            TwoHeads(),
            {"train": "head"},
            r"found 2 output heads in TwoHeads: `cls_head`, `box_head`\. Name those to train",
        ),
        (TwoTowers(), {"train": "head"}, r"found 2 output heads in TwoTowers: `picture`, `text`\. Name"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 1)),
            {"train": "head"},
            r"found no output head in Sequential\. Take train='bias'",
        ),
        (Quantized(), {"train": ["packed"]}, r"its dtype is torch\.uint8, which takes no gradient\. Take train='bias'"),
        (nn.Sequential(nn.LazyLinear(2)), {"train": "all"}, r"`0\.weight` has no shape yet \(a lazy module\): run one"),
    ],
)
def test_what_is_not_there_is_refused_by_name(model, arguments, words):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        adapt(model, TuneConfig(**arguments))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_integers_stay_as_they_are():
    assert trained(Quantized(), "all") == {"norm.weight", "norm.bias"}


def test_a_head_that_stays_frozen_as_it_was_drawn_is_named():
    method = TuneMethod(TuneConfig("bias"))
    method.complete(model := Encoder())
    (message,) = method.warnings(model)
    assert message.startswith("Frozen output head `head`: the weights look as if they were just drawn")
    assert "also_train=['head']" in message
    for config in (TuneConfig("bias", also_train=["head"]), TuneConfig("head"), TuneConfig("all")):
        method = TuneMethod(config)
        method.complete(model := Encoder())
        assert method.warnings(model) == []
