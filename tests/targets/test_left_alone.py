"""What "all" leaves alone is said at the start and in the plan, with a remedy that works."""

import pytest
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, plan_lora
from lightning_lora.model.report.summary import describe


def backbone():
    """A convolutional backbone with a projector of two layers."""
    convolutions = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(5)))
    return nn.ModuleDict({"backbone": convolutions, "projector": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})


def recurrent():
    return nn.ModuleDict({"lstm": nn.LSTM(4, 4), "cell": nn.GRUCell(4, 4), "out": nn.Linear(4, 2)})


def vision_transformer():
    """Its one convolution cuts the image into patches."""
    return nn.ModuleDict({"patches": nn.Conv2d(1, 4, 1), "body": nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))})


BOTH = [
    (backbone, "'all' means linear layers: 5 convolutions left alone. To adapt them name them: targets=['all', ", 3),
    (
        recurrent,
        "'all' means linear layers: 1 LSTM, 1 GRUCell left alone. To adapt them name them: targets=['all', ",
        2,
    ),
]


@pytest.mark.parametrize(("make", "words", "count"), BOTH)
def test_what_all_leaves_alone_is_said_with_a_remedy_that_works(make, words, count):
    config = LoRAConfig(r=2, targets="all")
    model = make()
    assert words in str(plan_lora(model, config))
    apply_lora(model, config)
    line = next(line for line in describe(model).splitlines() if line.startswith("'all' means"))
    assert line.startswith(words)
    remedy = line.rpartition("targets=")[2].strip("[]").replace("'", "").split(", ")
    assert len(apply_lora(make(), LoRAConfig(r=2, targets=remedy))) == count


@pytest.mark.parametrize(
    ("make", "targets"),
    [(vision_transformer, "all"), (backbone, ["projector.*"]), (recurrent, ["lstm", "cell", "out"])],
)
def test_nothing_is_said_where_little_was_left_or_a_list_names_layers(make, targets):
    assert "left alone" not in str(plan_lora(make(), LoRAConfig(r=2, targets=targets)))
