"""An input that was multiplied from two tensors: they are kept instead of it, where that is right."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, lora_parameters
from lightning_lora.ops.gated_product import large_saved_factors, saved_factors


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let what serves on GPUs serve on a CPU, at any size."""
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr("lightning_lora.ops.fused_linear.large_saved_factors", saved_factors)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 10), nn.Linear(6, 10)
        self.down_proj = nn.Linear(10, 6)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = Gated().double()
    apply_lora(model, LoRAConfig(r=2, targets="all"))
    for _, parameter in lora_parameters(model):
        parameter.data = torch.randn_like(parameter).double()
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for _, p in lora_parameters(model))]


@pytest.mark.slow
def test_values_and_gradients_of_every_order(monkeypatch):
    model, x = adapted(), torch.randn(2, 4, 6, dtype=torch.float64)
    found = gradients(model, x)
    pairs = [p for _, p in lora_parameters(model)]
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (leaf, *pairs))
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (leaf, *pairs))
    monkeypatch.setattr("lightning_lora.ops.fused_linear.large_saved_factors", large_saved_factors)  # none on a CPU
    for mine, theirs in zip(found, gradients(model, x), strict=True):
        assert torch.equal(mine, theirs)


def test_the_product_itself_is_not_kept(monkeypatch):
    model = adapted()
    held: list[weakref.ref[torch.Tensor]] = []
    model.down_proj.register_forward_pre_hook(lambda module, given: held.append(weakref.ref(given[0])))
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert held[0]() is None
    monkeypatch.setattr("lightning_lora.ops.fused_linear.large_saved_factors", large_saved_factors)
    other = model(x)
    assert held[1]() is not None
    torch.testing.assert_close(y, other)


def test_whose_factors_are_taken():
    one, other = (torch.randn(3, 4, requires_grad=True) * 1 for _ in range(2))
    found = saved_factors(one * other)
    assert found is not None and torch.equal(found[0], one) and torch.equal(found[1], other)
    assert saved_factors(one * 2) is None
    assert saved_factors(one + other) is None
    assert saved_factors(one * other[:1]) is None  # broadcast
    assert saved_factors(one * other.detach()) is None  # which keeps one of them
    assert saved_factors((one * other).detach()) is None
    assert saved_factors(torch.randn(3, 4)) is None
    assert saved_factors(one.T * other.T) is None  # not as rows
    with torch.autograd.graph.save_on_cpu():
        assert saved_factors(one * other) is None
    assert large_saved_factors(one * other) is None  # on a CPU


def test_what_was_written_to_since():
    one, other = (torch.randn(3, 4, requires_grad=True) * 1 for _ in range(2))
    x = one * other
    with torch.no_grad():
        one.add_(1)
    assert saved_factors(x) is None
    x = other * other.clone()
    with torch.no_grad():
        x[0] = 0
    assert saved_factors(x) is None


def test_an_input_that_was_written_to_has_its_own_gradient(monkeypatch):
    model, x = adapted(), torch.randn(4, 6, dtype=torch.float64)

    def masked(x):
        product = torch.tanh(model.gate_proj(x)) * model.up_proj(x)
        with torch.no_grad():
            product[0] = 0
        return model.down_proj(product)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            return masked(x)

    found = gradients(Masked(), x)
    monkeypatch.setattr("lightning_lora.ops.fused_linear.DEVICES", ())
    for mine, theirs in zip(found, gradients(Masked(), x), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_factor_that_is_written_to_before_backward_is_told():
    model, x = adapted(), torch.randn(4, 6, dtype=torch.float64)
    kept = torch.tanh(model.gate_proj(x))
    y = model.down_proj(kept * model.up_proj(x))
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, x = adapted(), torch.randn(2, 4, 6, dtype=torch.float64)
    wanted = gradients(model, x)
    whole = copy.deepcopy(model)
    forward = whole.forward
    whole.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    for mine, theirs in zip(gradients(whole, x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_who_has_the_product_may_differentiate_by_it_twice():
    model = adapted()
    one, other = (torch.randn(4, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    A = model.down_proj.lora.default.A

    def second(kept: bool) -> torch.Tensor:
        x = one * other
        first = torch.autograd.grad(model.down_proj(x).square().sum(), A, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x if kept else one)[0]

    found = [second(True), second(False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lora.ops.fused_linear.DEVICES", ())
        for mine, theirs in zip(found, [second(True), second(False)], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_product_that_somebody_hooks_on_to_is_kept():
    one, other = (torch.randn(3, 4, requires_grad=True) * 1 for _ in range(2))
    x = one * other
    x.register_hook(lambda gradient: gradient * 3)
    assert saved_factors(x) is None


def tensor(*shape, grad=True, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


PAIRS = {
    "one needs no gradient": (tensor(4, 6), tensor(4, 6, grad=False)),
    "one is broadcast": (tensor(4, 6), tensor(4, 1)),
    "dtypes differ": (tensor(4, 6), tensor(4, 6, dtype=torch.float64)),
    "one is not contiguous": (tensor(4, 6), tensor(6, 4).mT),
}


@pytest.mark.parametrize("name", PAIRS)
def test_factors_that_cannot_stand_for_the_product(name):
    first, second = PAIRS[name]
    assert saved_factors(first * second) is None and saved_factors(second * first) is None
    assert saved_factors(first * torch.randn(4, 6).requires_grad_()) is not None
