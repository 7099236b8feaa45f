"""DeepSpeed's ZeRO optimizers, read and written as torch's: stages 1 and 2 flatten parameters, stage 3 partitions them.

Read off DeepSpeed 0.19: its masters and its optimizer's state live in flat tensors, one for each group and rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

Groups = Sequence[Sequence[nn.Parameter]]


@contextmanager
def outside_of_init() -> Iterator[None]:
    """While it lasts, modules made inside ``deepspeed.zero.Init`` keep their parameters whole and in their dtype."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()  # does nothing where there is none
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


def optimizer_state(optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The state of a ZeRO optimizer as torch's ``state_dict`` of the optimizer inside; every rank must call it.

    Args:
        optimizer: DeepSpeed's.
        groups: the parameters of each group, as they were before DeepSpeed took them.
    """
    _link(optimizer)
    state = {id(p): each for p, each in _states(optimizer)}
    order = [parameter for group in groups for parameter in group]
    position = {id(parameter): index for index, parameter in enumerate(order)}
    options = iter(optimizer.optimizer.param_groups)
    written = []
    for group in groups:  # DeepSpeed drops empty ones
        own = next(options) if group else {}
        plain = {key: value for key, value in own.items() if key != "params"}
        written.append({**plain, "params": [position[id(parameter)] for parameter in group]})
    return {"state": {position[key]: each for key, each in state.items()}, "param_groups": written}


def _states(optimizer: Any) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    found = []
    for flat, parameters in zip(_flats(optimizer), _lists(optimizer), strict=True):
        for parameter in parameters:
            each = {}
            for key, value in optimizer.optimizer.state.get(flat, {}).items():
                alike = isinstance(value, Tensor) and value.shape == flat.shape
                whole = safe_get_full_optimizer_state(parameter, key) if alike else value
                each[key] = whole.detach().to("cpu", copy=True) if isinstance(whole, Tensor) else whole
            found.append((parameter, each))
    return [(parameter, each) for parameter, each in found if each]


def load_optimizer(optimizer: Any, groups: Groups, state: Mapping[str, Any], values: Mapping[int, Tensor]) -> None:
    """The reverse of :func:`optimizer_state`, with the values of the parameters by their identity."""
    order = [parameter for group in groups for parameter in group]
    saved = {id(parameter): state["state"].get(index, {}) for index, parameter in enumerate(order)}
    for flat, parameters in zip(_flats(optimizer), _lists(optimizer), strict=True):
        own = saved[id(parameters[0])]
        shape = values[id(parameters[0])].shape
        optimizer.optimizer.state[flat] = {key: _room(value, shape, flat) for key, value in own.items()}
    _link(optimizer)
    for parameters in _lists(optimizer):
        for parameter in parameters:
            value = values[id(parameter)]
            _put(parameter, value)
            for key, each in saved[id(parameter)].items():
                if isinstance(each, Tensor) and each.shape == value.shape:
                    _put(parameter, each, key)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for index in range(len(_lists(optimizer))):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
    written = [group for group in state["param_groups"] if group["params"]]
    for own, options in zip(optimizer.optimizer.param_groups, written, strict=True):
        own.update({key: value for key, value in options.items() if key != "params"})


def _room(value: Any, shape: torch.Size, flat: Tensor) -> Any:
    if isinstance(value, Tensor) and value.shape == shape and value.dim():
        return torch.zeros_like(flat.data)
    return value.to(flat.device) if isinstance(value, Tensor) and value.dim() else value


def _flats(optimizer: Any) -> list[Tensor]:
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups)


def _lists(optimizer: Any) -> list[list[nn.Parameter]]:
    return list(optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.bit16_groups)


def _link(optimizer: Any) -> None:
    # Stage 2 links the states at the first group's first step, when those of the others do not exist yet.
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _put(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # By this rank's part: of a size that the ranks do not divide, the last one's reaches beyond the end.
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = torch.cat([value.flatten(), value.new_zeros(size * distributed.get_world_size() - value.numel())])
    part = padded.view(-1, size)[distributed.get_rank()]
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)
