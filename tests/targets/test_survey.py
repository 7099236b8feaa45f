"""One list of a model's modules, held against what torch says of the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.targets.survey import Survey, memory_of, survey_of


class Model(nn.Module):
    """A layer under two names, a tied head, one memory in two parameters, and wrappers."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.again = self.fc
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.view = nn.Linear(4, 4, bias=False)
        self.view.weight = nn.Parameter(self.fc.weight.detach())
        self.wrapped = checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        self.compiled = torch.compile(nn.Linear(4, 2))


def names_of(survey: Survey) -> dict[str, list[str]]:
    return {name: site.names for name, site in survey.sites.items()}


SITES = {
    "": [""],
    "embed": ["embed"],
    "fc": ["fc", "again"],
    "head": ["head"],
    "view": ["view"],
    "wrapped": ["wrapped"],
    "wrapped.0": ["wrapped.0"],
    "wrapped.1": ["wrapped.1"],
    "compiled": ["compiled"],
}


def test_sites_have_every_module_once_with_all_its_names():
    model = Model()
    survey = Survey(model)
    assert names_of(survey) == SITES
    assert survey.by_name["wrapped.0"] is model.wrapped._checkpoint_wrapped_module[0]
    assert survey.by_name["compiled"] is model.compiled._orig_mod
    assert survey.walk == list(model.named_modules(remove_duplicate=False))
    assert survey.modules == list(model.named_modules())


def test_nothing_of_an_adapter_is_a_site():
    model = Model()
    apply_lora(model, LoRAConfig(targets=["fc", "0"]))
    assert names_of(Survey(model)) == SITES
    assert len(Survey(model).modules) == len(list(model.modules())) > len(SITES) + 2
    with pytest.warns(UserWarning, match=r"`fc\.weight` was shared"):
        merge_lora(model)
    assert names_of(Survey(model)) == SITES


def test_a_survey_is_good_for_the_adapted_model():
    model = Model()
    before = Survey(model)
    assert before.layers() == []
    apply_lora(model, LoRAConfig(targets=["0"]))
    assert before.layers() == [before.by_name["wrapped.0"]]
    inner = model.wrapped._checkpoint_wrapped_module
    assert list(before.around_layers().values()) == [model, model.wrapped, inner, inner[0]]
    assert names_of(before) == names_of(Survey(model))


@pytest.mark.parametrize("adapted", [False, True])
def test_parameters_are_those_of_torch_in_its_order(adapted):
    model = Model()
    if adapted:
        apply_lora(model, LoRAConfig(targets=["fc", "0"]))
    names = {id(p): name for name, p in model.named_parameters()}
    listed = list(Survey(model).parameters())
    assert [id(p) for _, p in listed] == list(names)
    expected = [name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "") for name in names.values()]
    assert [name for name, _ in listed] == expected


def test_shared_parameters():
    model = Model()
    survey = Survey(model)
    shared = {
        (name, key)
        for name, site in survey.sites.items()
        for key in site.module._parameters
        if survey.is_shared(site.module, key)
    }
    assert {pair for pair in shared if pair[1] == "weight"} == {(n, "weight") for n in ("embed", "head", "fc", "view")}


def test_on_the_meta_device_only_one_object_is_shared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert memory_of(model[0], "weight") != memory_of(model[1], "weight")
    assert not Survey(model).is_shared(model[0], "weight")
    model[1].weight = model[0].weight
    assert Survey(model).is_shared(model[0], "weight")


def test_a_survey_is_its_own_survey():
    survey = Survey(Model())
    assert survey_of(survey) is survey
    assert survey_of(survey.model) is not survey
