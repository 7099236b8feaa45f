"""A model of random weights on the device, and a step of AdamW that trains it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from speed_sections.settings import CUDA, DEVICE
from speed_sections.timing import Step


def drawn(make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of random weights, the same at each call, in training mode."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return make().train()
    finally:
        torch.set_default_dtype(before)


def training(loss: Callable[[Any], Tensor], model: nn.Module, compiled: bool = False, autocast: bool = False) -> Step:
    """A step of ``model``; ``loss`` is given the model, or what the compiler made of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    call = compile_apart(model) if compiled else model

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            value = loss(call)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compile_apart(model: nn.Module) -> Callable[..., Any]:
    """``torch.compile`` with a cache of its own.

    The compiler keeps its graphs by code object, so that models of one class share them. A model whose graph breaks
    early then leaves an entry that other models match too, which run its broken graphs from there on.
    """

    def forward(*arguments: Any, **keywords: Any) -> Any:
        return model(*arguments, **keywords)

    copy = FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    # On a CPU only the script is tried, and inductor would compile for minutes.
    return torch.compile(copy, backend="inductor" if CUDA else "aot_eager")
