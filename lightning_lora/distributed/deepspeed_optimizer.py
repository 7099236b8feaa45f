"""Read and write the state of DeepSpeed's ZeRO optimizers in the format of torch.

Stages 1 and 2 flatten parameters, stage 3 partitions them. In DeepSpeed 0.19 the fp32 master weights and the state of
the optimizer are flat tensors, one for each group and rank.
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
    """Context manager in which ``deepspeed.zero.Init`` does not partition or cast the parameters of new modules."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()  # does nothing outside of such a context
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


def optimizer_state(optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The ``state_dict`` of a ZeRO optimizer in the format of the torch optimizer that it wraps.

    Every rank must call this.

    Args:
        optimizer: the ZeRO optimizer.
        groups: the parameters of each group, as they were before DeepSpeed replaced them.
    """
    _link_states(optimizer)
    state = {id(parameter): values for parameter, values in _states(optimizer)}
    order = [parameter for group in groups for parameter in group]
    position = {id(parameter): index for index, parameter in enumerate(order)}
    options = iter(optimizer.optimizer.param_groups)
    written = []
    for group in groups:  # DeepSpeed drops empty groups
        all_options = next(options) if group else {}
        plain = {key: value for key, value in all_options.items() if key != "params"}
        written.append({**plain, "params": [position[id(parameter)] for parameter in group]})
    return {"state": {position[key]: values for key, values in state.items()}, "param_groups": written}


def _states(optimizer: Any) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    states = []
    for flat, parameters in zip(_flat_tensors(optimizer), _parameter_groups(optimizer), strict=True):
        for parameter in parameters:
            state = {}
            for key, value in optimizer.optimizer.state.get(flat, {}).items():
                per_element = isinstance(value, Tensor) and value.shape == flat.shape
                full = safe_get_full_optimizer_state(parameter, key) if per_element else value
                state[key] = full.detach().to("cpu", copy=True) if isinstance(full, Tensor) else full
            states.append((parameter, state))
    return [(parameter, state) for parameter, state in states if state]


def load_optimizer(optimizer: Any, groups: Groups, state: Mapping[str, Any], values: Mapping[int, Tensor]) -> None:
    """Load what :func:`optimizer_state` returned.

    Args:
        optimizer: the ZeRO optimizer.
        groups: the parameters of each group, as they were before DeepSpeed replaced them.
        state: the ``state_dict``.
        values: the full values of the parameters, by the ``id`` of each.
    """
    order = [parameter for group in groups for parameter in group]
    saved = {id(parameter): state["state"].get(index, {}) for index, parameter in enumerate(order)}
    for flat, parameters in zip(_flat_tensors(optimizer), _parameter_groups(optimizer), strict=True):
        first = saved[id(parameters[0])]
        shape = values[id(parameters[0])].shape
        optimizer.optimizer.state[flat] = {key: _flat_like(value, shape, flat) for key, value in first.items()}
    _link_states(optimizer)
    for parameters in _parameter_groups(optimizer):
        for parameter in parameters:
            value = values[id(parameter)]
            _set_full(parameter, value)
            for key, moment in saved[id(parameter)].items():
                if isinstance(moment, Tensor) and moment.shape == value.shape:
                    _set_full(parameter, moment, key)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for index in range(len(_parameter_groups(optimizer))):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
    saved_groups = [group for group in state["param_groups"] if group["params"]]
    for group, options in zip(optimizer.optimizer.param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})


def _flat_like(value: Any, shape: torch.Size, flat: Tensor) -> Any:
    """An entry of a saved state as the flat state stores it, not yet filled where it has a value per element."""
    if isinstance(value, Tensor) and value.shape == shape and value.dim():
        return torch.zeros_like(flat.data)
    return value.to(flat.device) if isinstance(value, Tensor) and value.dim() else value


def _flat_tensors(optimizer: Any) -> list[Tensor]:
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups)


def _parameter_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    return list(optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.bit16_groups)


def _link_states(optimizer: Any) -> None:
    # Stage 2 links the states at the first step of the first group, before those of the other groups exist.
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_full(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # By shards: if the number of ranks does not divide the size, the last shard is padded.
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = torch.cat([value.flatten(), value.new_zeros(size * distributed.get_world_size() - value.numel())])
    shard = padded.view(-1, size)[distributed.get_rank()]
    if key is None:
        utils.safe_set_local_fp32_param(parameter, shard)
    else:
        utils.safe_set_local_optimizer_state(parameter, shard, key)
