"""Remedies of messages about subspaces."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora import SubspaceConfig, adapt
from tests.helpers.models import Encoder
from tests.helpers.remedies.case import Expected, remedy

SITES = "methods/subspace/sites.py"


@remedy("methods/subspace/config.py", "`targets` must be 'all' or a list", "'embed'", "write targets=['embed']")
def a_module_to_project_by_its_name(message: Expected, folder: Path) -> None:
    with message:
        SubspaceConfig(targets="embed")
    assert adapt(Encoder(), SubspaceConfig(targets=["embed"])) == ["embed"]


@remedy(SITES, "{} has no floating parameter to project", "Sequential has", "or name fewer in these")
def something_left_to_project(message: Expected, folder: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    with message:
        adapt(model(), SubspaceConfig(also_train=["0", "1"]))
    assert adapt(model(), SubspaceConfig(also_train=["1"])) == ["0"]


@remedy(SITES, "`{}` has no shape yet, as its module is lazy", "`0.weight`", "Run one batch through")
def a_lazy_module_that_has_run(message: Expected, folder: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))

    with message:
        adapt(model(), SubspaceConfig())
    ran = model()
    ran(torch.ones(1, 3))
    assert adapt(ran, SubspaceConfig()) == ["0", "1"]


@remedy(SITES, "`{}` is in a compiled TorchScript module", "`0.weight`", "Build the model in Python")
def a_model_in_python(message: Expected, folder: Path) -> None:
    with message:
        adapt(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), SubspaceConfig())
    assert adapt(nn.Sequential(nn.Linear(2, 2)), SubspaceConfig()) == ["0"]
