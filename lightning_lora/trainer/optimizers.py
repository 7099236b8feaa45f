"""Restrict the user's optimizers to what trains, by editing their groups in place.

The number of groups stays: schedulers hold one value for each group, and break when one is added.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora import names
from lightning_lora.foreign import PARTITIONED_OPTIMIZER, SPARSE_OPTIMIZER, is_a
from lightning_lora.methods.base import Method
from lightning_lora.trainer.imports import MisconfigurationException

Group = dict[str, Any]


def restrict(optimizers: list[Optimizer], model: nn.Module, method: Method) -> list[OptimizerSnapshot]:
    """Make the union of all groups exactly what the method trains.

    An added parameter goes into every group that holds the weight it adapts, so that it gets the learning rate, the
    weight decay and the optimizer of that weight. Where no group holds the weight, it stays where the user's code put
    it, or goes into the first group.

    Returns:
        What the optimizers held, to restore it: an optimizer that was made before the run outlives it.

    Raises:
        MisconfigurationException: for an optimizer that cannot be edited.
    """
    for optimizer in optimizers:
        _refuse_partitioned(optimizer)
    snapshots = [OptimizerSnapshot(optimizer, model, method) for optimizer in optimizers]
    wanted = _wanted(optimizers, model, method)
    for optimizer in optimizers:
        _refuse_sparse(optimizer, wanted, method.adapted_weights(model).keys())
    label = {id(parameter): name for name, parameter in names.named_parameters(model)}
    for optimizer in optimizers:
        keeps_state = bool(optimizer.state)
        for group in optimizer.param_groups:
            _edit(optimizer, group, wanted[id(group)], label)
            _refuse_half(optimizer, group, label)
        if keeps_state:
            _seed_state(optimizer)
    return snapshots


class OptimizerSnapshot:
    """The parameters of an optimizer before a run, and their states if it has stepped.

    States that an optimizer makes in ``__init__``, as Adagrad does, are not kept, as they are as large as the base:
    they are made again.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, method: Method) -> None:
        self.optimizer, self.had_state, self.model = optimizer, bool(optimizer.state), model
        self.added = {id(parameter) for _, parameter in method.added_parameters(model)}
        self.groups = [(list(group["params"]), list(group.get("param_names", ()))) for group in optimizer.param_groups]
        self.states = dict(optimizer.state) if any(map(_has_stepped, optimizer.state.values())) else {}

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [parameter for parameters, _ in self.groups for parameter in parameters]

    def restore(self) -> None:
        """Put the parameters and their states back, and drop the states of adapters.

        Adapters that are merged meanwhile are left out, so that a checkpoint of the merged module holds the optimizer
        that a run without adapters makes.
        """
        gone = self.added - set(map(id, self.model.parameters()))
        for group, (parameters, labels) in zip(self.optimizer.param_groups, self.groups, strict=False):
            kept = [place for place, parameter in enumerate(parameters) if id(parameter) not in gone]
            group["params"][:] = [parameters[place] for place in kept]
            if "param_names" in group:
                group["param_names"][:] = [labels[place] for place in kept]
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter in list(self.optimizer.state):
            if id(parameter) not in held:
                del self.optimizer.state[parameter]
        self.optimizer.state.update(self.states)
        if self.had_state:
            _seed_state(self.optimizer)


def _has_stepped(state: Any) -> bool:
    return not isinstance(state, dict) or bool(state.get("step", 1))


def _refuse_partitioned(optimizer: Optimizer) -> None:
    """Raise for ``ZeroRedundancyOptimizer``, which divides its parameters among the ranks when it is made.

    Adapters that are added later would never move.
    """
    if is_a(optimizer, PARTITIONED_OPTIMIZER):
        raise MisconfigurationException(
            "`ZeroRedundancyOptimizer` divides its parameters among ranks when it is made, so adapters put into it "
            "would never move. Use the plain optimizer in `configure_optimizers`: the state of adapters is small."
        )


def _refuse_sparse(optimizer: Optimizer, wanted: dict[int, list[nn.Parameter]], adapters: Collection[int]) -> None:
    """Raise where ``SparseAdam`` would get an adapter, whose gradients are dense; what trains in full it may have."""
    if not is_a(optimizer, SPARSE_OPTIMIZER):
        return
    if any(id(parameter) in adapters for group in optimizer.param_groups for parameter in wanted[id(group)]):
        raise MisconfigurationException(
            "`SparseAdam` takes sparse gradients only, and those of adapters are dense. Use Adam in "
            "`configure_optimizers`, or leave the embedding out with `exclude`."
        )


def _refuse_half(optimizer: Optimizer, group: Group, label: dict[int, str]) -> None:
    """Raise where one of torch's optimizers would divide by an ``eps`` that is 0 in the dtype of its states."""
    eps = group.get("eps")
    if not isinstance(eps, float) or torch.tensor(eps, dtype=torch.float16) or not _is_of_torch(optimizer):
        return
    for parameter in group["params"]:
        if parameter.dtype == torch.float16:
            raise MisconfigurationException(
                f"`{label[id(parameter)]}` trains in float16, where the `eps={eps}` of {type(optimizer).__name__} is "
                "0: it divides by 0 where a gradient is 0 or small, and NaN follows. Load the module in bf16 or fp32, "
                "or use an optimizer whose states are fp32, such as bitsandbytes.optim.AdamW."
            )


def _is_of_torch(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is torch's own, with states in the dtype of the parameters."""
    step: Any = type(optimizer).step
    return bool(inspect.unwrap(step).__module__.startswith("torch.optim."))


def _wanted(optimizers: list[Optimizer], model: nn.Module, method: Method) -> dict[int, list[nn.Parameter]]:
    """The parameters that each group is to hold, by the ``id`` of the group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    groups_with: dict[int, list[Group]] = {}
    for group in groups:
        for parameter in group["params"]:
            groups_with.setdefault(id(parameter), []).append(group)
    weight_of = {key: id(weight) for key, (_, weight) in method.adapted_weights(model).items()}
    wanted: dict[int, list[nn.Parameter]] = {id(group): [] for group in groups}
    for _, parameter in method.trained_parameters(model):
        of_the_weight = groups_with.get(weight_of.get(id(parameter), 0), [])
        for group in of_the_weight or groups_with.get(id(parameter), []) or groups[:1]:
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


def seed_missing(optimizers: list[Optimizer]) -> None:
    """Make the states of parameters that a file does not know, where an optimizer makes them in ``__init__``."""
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if optimizer.state and any(parameter not in optimizer.state for parameter in held):
            _seed_state(optimizer)


def _seed_state(optimizer: Optimizer) -> None:
    """Make the state of new parameters where an optimizer makes it in ``__init__``, as Adagrad does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                known = inspect.signature(type(optimizer)).parameters
                arguments = {key: group.get(key, value) for key, value in optimizer.defaults.items() if key in known}
                fresh = type(optimizer)([parameter], **arguments)
                if parameter in fresh.state:
                    optimizer.state[parameter] = fresh.state[parameter]
