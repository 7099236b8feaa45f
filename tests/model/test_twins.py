"""Which layers start with the same A: copies of a network, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.layers.adapter import initial_A, seed_of
from lightning_lora.model.inject import inject
from lightning_lora.targets.resolve import find_targets
from tests.helpers.models import net

QV = LoRAConfig(r=2, targets=["q", "v"])


def A_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".lora.default.A"): p for name, p in lora_parameters(model) if name.endswith(".A")}


def by_name(name: str, features: int = 16) -> torch.Tensor:
    return initial_A((2, features), "kaiming", seed_of(None, name, "default"))


def test_a_teacher_starts_with_the_adapters_of_its_student():
    student = net()
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    apply_lora(model, QV)
    A = A_of(model)
    assert len(A) == 8
    for block in (0, 1):
        for layer in "qv":
            name = f"layers.{block}.{layer}"
            assert torch.equal(A[f"student.{name}"], by_name(f"student.{name}"))
            assert torch.equal(A[f"teacher.{name}"], A[f"student.{name}"])


def test_a_second_adapter_has_twins_of_its_own():
    """Also where the first was only on one of the two networks."""
    student = net()
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    apply_lora(model["student"], LoRAConfig(r=2, targets=["q"], name="first"))
    apply_lora(model, LoRAConfig(r=3, targets=["q", "v"], name="second"))
    state = model.state_dict()
    of_student = [key for key in state if key.startswith("student.") and key.endswith("second.A")]
    assert len(of_student) == 4 and len({str(state[key].tolist()) for key in of_student}) == 4
    assert all(torch.equal(state[key], state[key.replace("student.", "teacher.", 1)]) for key in of_student)


def test_an_average_of_the_parameters_is_the_average_of_the_student():
    """Averaging A and B of a teacher by position, from equal starts, gives the average of the student's."""
    model = nn.ModuleDict({"student": (student := net()), "ema": torch.optim.swa_utils.AveragedModel(student)})
    apply_lora(model, QV)
    expected = {name: p.detach().clone() for name, p in student.named_parameters()}
    model["ema"].update_parameters(student)
    for step in (1, 2):
        for _, parameter in lora_parameters(student):
            parameter.data += step
        model["ema"].update_parameters(student)
        for name, p in student.named_parameters():
            expected[name] = expected[name] + (p.detach() - expected[name]) / (step + 1)
    for name, parameter in model["ema"].module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)


def clones() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def constant() -> nn.Module:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})
    for layer in model.values():
        nn.init.zeros_(layer.weight)
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})
    model["v"].weight = model["q"].weight
    return model


@pytest.mark.parametrize(
    ("make", "targets"),
    [(clones, ["linear1"]), (constant, ["q", "v"]), (tied, ["q", "v"])],
    ids=["clones", "zero", "tied"],
)
def test_other_layers_are_seeded_by_their_own_name(make, targets):
    model = make()
    apply_lora(model, LoRAConfig(r=2, targets=targets))
    A = A_of(model)
    assert len(A) == 2
    assert all(torch.equal(value, by_name(name, 8)) for name, value in A.items())


def test_a_change_of_one_bit_makes_two_layers():
    model = nn.ModuleDict({"student": nn.Linear(64, 64)})
    model["teacher"] = copy.deepcopy(model["student"])
    model["teacher"].weight.data[3, 5] += 1e-6
    apply_lora(model, LoRAConfig(r=2, targets=["student", "teacher"]))
    assert all(torch.equal(value, by_name(name, 64)) for name, value in A_of(model).items())


def test_a_copy_that_comes_later_takes_the_name_of_what_is_adapted():
    model = nn.ModuleDict({"teacher": nn.Identity(), "student": net()})
    apply_lora(model, QV)
    model["teacher"] = net()  # stands before the student
    apply_lora(model, QV)
    A = A_of(model)
    assert torch.equal(A["teacher.layers.0.q"], by_name("student.layers.0.q"))


def test_the_answer_of_the_first_rank_counts():
    model = nn.ModuleDict({"student": net(), "teacher": nn.Linear(16, 16)})
    targets = find_targets(model, LoRAConfig(r=2, targets=["student.layers.0.q", "teacher"]))
    inject(targets, LoRAConfig(r=2), agree=lambda own: {"teacher": "student.layers.0.q"} if own == {} else {})
    assert torch.equal(A_of(model)["teacher"], by_name("student.layers.0.q"))


def test_networks_whose_values_are_not_here_yet_are_warned_of_once():
    with torch.device("meta"):
        model = nn.ModuleDict({"student": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        model["teacher"] = copy.deepcopy(model["student"])
        alone = nn.ModuleDict({"student": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match=r"^`student`, `teacher` have the same layers, whose values are not") as seen:
        apply_lora(model, LoRAConfig(r=2, targets=["0", "1"]))
    assert len(seen) == 1
    apply_lora(alone, LoRAConfig(r=2, targets=["0", "1"]))  # warnings are errors
