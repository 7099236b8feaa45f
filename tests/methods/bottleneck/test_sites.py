"""Which sublayers get a bottleneck by placement, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.sites import find_sites
from lightning_lora.targets.survey import Survey
from tests.helpers import models, zoo

SITES = {
    "houlsby": ["layers.0.o", "layers.1.o", "layers.0.mlp", "layers.1.mlp"],
    "pfeiffer": ["layers.0.mlp", "layers.1.mlp"],
    "parallel": ["layers.0.mlp", "layers.1.mlp"],
    "block": ["layers.0", "layers.1"],
}


def names(model, **arguments):
    return [sublayer.output for sublayer in find_sites(Survey(model), BottleneckConfig(**arguments))]


@pytest.mark.parametrize("placement", SITES)
def test_placements(placement):
    assert names(models.Net(), placement=placement) == SITES[placement]


@pytest.mark.parametrize("argument", ["exclude", "also_train"])
def test_what_is_left_out(argument):
    assert names(models.Net(), placement="pfeiffer", **{argument: ["layers.0"]}) == ["layers.1.mlp"]
    with pytest.raises(
        ValueError, match=rf"`placement='block'` finds only modules that `{argument}=\['layers'\]` leave"
    ):
        names(models.Net(), placement="block", **{argument: ["layers"]})


@pytest.mark.parametrize(
    ("model", "placement", "words"),
    [
        (nn.Linear(2, 2), "houlsby", "`placement='houlsby'` found no attention in Linear. LoRACallback(targets='all')"),
        (nn.Linear(2, 2), "pfeiffer", "`placement='pfeiffer'` found no MLP in Linear."),
        (models.FusedBlocks(), "houlsby", "found no MLP in FusedBlocks. Take placement='block', for which it has all."),
    ],
)
def test_models_without_the_sublayer(model, placement, words):
    with pytest.raises(ValueError) as raised:
        names(model, placement=placement)
    assert words in str(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_a_list_is_no_block():
    model, _ = zoo.build(zoo.CASES["idefics"])
    words = r"`model.perceiver_resampler.blocks.0` is a list of the parts of a block.*exclude=\['model.perceiver_resa"
    with pytest.raises(ValueError, match=words):
        names(model, placement="block")
    assert names(model, placement="block", exclude=["model.perceiver_resampler.blocks.0"])
