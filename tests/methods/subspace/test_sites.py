"""Which parameters are projected, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.models import net
from tests.helpers.subspaces import every_kind, method


def test_what_is_chosen():
    def chosen(**arguments: object) -> set[str]:
        model, by = net(), method(**arguments)
        by.complete(model)
        moved = set()
        for name, module in model.named_modules():
            moved |= {f"{name}.{key}" for key in getattr(getattr(module, "subspace", None), "seeds", {})}
        return moved

    every = {name for name, _ in net().named_parameters()}
    assert chosen() == every
    assert chosen(targets=["q", "head.bias"]) == {n for n in every if ".q." in n} | {"head.bias"}
    assert chosen(exclude=["layers.*"]) == {"head.weight", "head.bias"}
    assert chosen(also_train=["head"]) == {n for n in every if not n.startswith("head")}
    assert chosen(bias="all") == {n for n in every if not n.endswith("bias")}


def test_a_tied_parameter_is_excluded_by_any_of_its_names():
    model = every_kind()
    method(exclude=["head"]).complete(model)
    assert not hasattr(model.embedding, "subspace")


class Holds(nn.Linear):
    """A layer with an attribute of the name that the child would get."""

    subspace = 1


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda: nn.Sequential(nn.ReLU()), {}, r"Sequential has no floating parameter to project"),
        (net, {"also_train": ["layers", "head"]}, r"has no floating parameter to project, apart from"),
        (net, {"targets": ["hed"]}, r"`targets` has 'hed', which matches no module .* nearest names are `head"),
        (net, {"exclude": ["hed"]}, r"`exclude` has 'hed', which matches no module"),
        (lambda: nn.LazyLinear(3), {}, "`weight` has no shape yet, as its module is lazy"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), {}, "`weight` is in a compiled TorchScript module"),
        (lambda: Holds(2, 2), {}, r"has an attribute `subspace` of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated", "ignore:Lazy modules")
def test_refusals(make, arguments, words):
    model = make()
    with pytest.raises(ValueError, match=words):
        method(**arguments).complete(model)
    assert not any(hasattr(type(module), "original_class") for module in model.modules())
