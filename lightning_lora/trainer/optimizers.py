"""The user's optimizers, restricted to what LoRA trains, their groups edited in place.

The number of groups stays: schedulers hold one value for each, and break when one is added.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lora import names
from lightning_lora.layers.base import adapted_layers, parameter_of
from lightning_lora.model.freeze import adapter_parameters, trained_parameters
from lightning_lora.trainer.compatibility import is_a
from lightning_lora.trainer.imports import MisconfigurationException

Group = dict[str, Any]


def restrict(optimizers: list[Optimizer], model: nn.Module) -> None:
    """Make the union of all groups exactly what LoRA trains.

    A and B go into every group that holds the weight they adapt, so that they get its learning rate, its weight decay
    and its optimizer; where no group holds it, they stay where the user's code put them, or go into the first group.

    Raises:
        MisconfigurationException: for an optimizer that cannot be edited.
    """
    for optimizer in optimizers:
        refuse(optimizer)
    wanted = _wanted(optimizers, model)
    label = {id(parameter): name for name, parameter in names.named_parameters(model)}
    for optimizer in optimizers:
        keeps_state = bool(optimizer.state)
        for group in optimizer.param_groups:
            _edit(optimizer, group, wanted[id(group)], label)
        if keeps_state:
            _seed_state(optimizer)


def refuse(optimizer: Optimizer) -> None:
    """Raise for an optimizer in which adapters would silently never move, or could not step."""
    if is_a(optimizer, "ZeroRedundancyOptimizer"):
        raise MisconfigurationException(
            "`ZeroRedundancyOptimizer` divides its parameters among ranks when it is made, so adapters put into it "
            "would never move. Use the plain optimizer in `configure_optimizers`: the state of adapters is small."
        )
    if is_a(optimizer, "SparseAdam"):
        raise MisconfigurationException(
            "`SparseAdam` takes sparse gradients only, and those of adapters are dense. Use Adam in "
            "`configure_optimizers`, or leave the embedding out with `exclude`."
        )


def _wanted(optimizers: list[Optimizer], model: nn.Module) -> dict[int, list[nn.Parameter]]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    holding: dict[int, list[Group]] = {}
    for group in groups:
        for parameter in group["params"]:
            holding.setdefault(id(parameter), []).append(group)
    weight = {
        id(p): parameter_of(layer, adapter.part.key)
        for _, layer in adapted_layers(model)
        for adapter in layer.lora.every()
        for p in adapter.parameters()
    }
    wanted: dict[int, list[nn.Parameter]] = {id(group): [] for group in groups}
    for _, parameter in trained_parameters(model):
        beside = holding.get(id(weight.get(id(parameter))), [])
        for group in beside or holding.get(id(parameter), []) or groups[:1]:
            wanted[id(group)].append(parameter)
    return wanted


def _edit(optimizer: Optimizer, group: Group, wanted: list[nn.Parameter], label: dict[int, str]) -> None:
    keep = {id(parameter) for parameter in wanted}
    for parameter in group["params"]:
        if id(parameter) not in keep:
            optimizer.state.pop(parameter, None)
    group["params"][:] = wanted
    if "param_names" in group:
        group["param_names"][:] = [label[id(parameter)] for parameter in wanted]


def _seed_state(optimizer: Optimizer) -> None:
    """Adagrad and its like make their state when they are made, and step on nothing without it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                known = inspect.signature(type(optimizer)).parameters
                arguments = {key: group.get(key, value) for key, value in optimizer.defaults.items() if key in known}
                fresh = type(optimizer)([parameter], **arguments)
                if parameter in fresh.state:
                    optimizer.state[parameter] = fresh.state[parameter]


def holds_adapters(group: Group, model: nn.Module) -> bool:
    """Whether the group trains an adapter."""
    adapters = adapter_parameters(model)
    return any(id(parameter) in adapters for parameter in group["params"])
