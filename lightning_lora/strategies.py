"""What each strategy of Lightning needs, so that adapters train, save and load alike under every one.

A strategy that shards has only the frozen base to shard. What trains stays whole on every rank: its gradients are
averaged by :mod:`lightning_lora.replicas`, and a save or a load moves nothing of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, distributed, nn

from lightning_lora import names
from lightning_lora.compatibility import is_a
from lightning_lora.freeze import trained_parameters
from lightning_lora.layer import adapted_layers, parameter_of
from lightning_lora.lightnings import MisconfigurationException
from lightning_lora.replicas import Replicas
from lightning_lora.sharded import clip_by_norm, is_sharded, laid_out_as, units, whole
from lightning_lora.wraps import put, wrap

FSDP1, FSDP2 = "FSDPStrategy", "ModelParallelStrategy"


def shards(strategy: Any) -> bool:
    """Whether ``strategy`` shards what the ranks hold."""
    return is_a(strategy, FSDP1, FSDP2)


def prepare(stack: ExitStack, strategy: Any) -> None:
    """Until ``stack`` closes, let a strategy that shards write one file and clip what it would not.

    Directories of shards cannot hold a part of a module: torch's loader rejects missing keys.
    """
    if is_a(strategy, FSDP1):
        put(stack, strategy, "_state_dict_type", "full")
    if is_a(strategy, FSDP2):
        put(stack, strategy, "_save_distributed_checkpoint", False)
    if shards(strategy):
        wrap(stack, strategy, "optimizer_state", optimizer_state)
        wrap(stack, strategy.precision_plugin, "clip_grad_by_norm", _clip(strategy.precision_plugin))


def _clip(plugin: Any) -> Callable[..., None]:
    def clip(original: Any, optimizer: Any, clip_val: float) -> None:
        if clip_val > 0:
            clip_by_norm(plugin.main_params(optimizer), clip_val)

    return clip


def check_unwrapped(module: nn.Module) -> None:
    """Raise if ``module``, which has no adapters yet, is in FSDP1 units already: its weights are pieces of flat ones.

    Raises:
        MisconfigurationException: saying how to wrap it instead.
    """
    if units(module):
        raise MisconfigurationException(
            f"{type(module).__name__} is wrapped in FullyShardedDataParallel already, in its `configure_model`, and "
            "adapters can only come before that. Leave the wrapping to the strategy: "
            "FSDPStrategy(auto_wrap_policy={YourBlock})."
        )


def settle(stack: ExitStack, strategy: Any, module: nn.Module) -> None:
    """Prepare the adapted ``module`` for what the strategy will do with it.

    Raises:
        MisconfigurationException: if it is laid out in a way that adapters do not take part in.
    """
    if is_a(strategy, FSDP1) and not units(module):
        _leave_out(stack, strategy, module)
    if is_a(strategy, FSDP2):
        _check_layout(module)


def _leave_out(stack: ExitStack, strategy: Any, module: nn.Module) -> None:
    """FSDP1 neither shards, moves nor materializes what it ignores."""
    trained = {id(parameter) for _, parameter in trained_parameters(module)}
    for part in module.modules():
        if any(parameter.is_meta and id(parameter) in trained for parameter in part.parameters(recurse=False)):
            part.to_empty(device=strategy.root_device, recurse=False)
            part.reset_parameters()  # type: ignore[operator]
    ours = [parameter for _, parameter in trained_parameters(module)]
    for parameter in ours:
        parameter.data = parameter.data.to(strategy.root_device)
    theirs = [*strategy.kwargs.get("ignored_states", ()), *strategy.kwargs.get("ignored_modules", ())]
    ignored = [p for one in theirs for p in (one.parameters() if isinstance(one, nn.Module) else [one])]
    kwargs = {key: value for key, value in strategy.kwargs.items() if key != "ignored_modules"}
    put(stack, strategy, "kwargs", {**kwargs, "ignored_states": [*ignored, *ours]})


def _check_layout(module: nn.Module) -> None:
    for name, layer in adapted_layers(module):
        for key in layer.lora.by_weight():
            weight = parameter_of(layer, key)
            if is_sharded(weight) and "tensor_parallel" in (weight.device_mesh.mesh_dim_names or ()):  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    f"`{names.join(name, key)}` is split by tensor parallelism, which adapters do not take part "
                    "in. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), or leave the layer "
                    "out with `exclude`."
                )


def holds_merge(strategy: Any) -> bool:
    """Whether the module can hold merged weights under ``strategy``: FSDP1 leaves pieces of flat ones."""
    return not is_a(strategy, FSDP1)


def join_ranks(stack: ExitStack, strategy: Any, module: nn.Module, optimizers: Iterable[Any]) -> None:
    """From here on average the gradients of what is whole on every rank, where the strategy leaves it to us."""
    if not shards(strategy):
        return
    _check_groups(optimizers)
    if distributed.get_world_size() == 1:
        return
    replicas = Replicas([p for _, p in trained_parameters(module) if not is_sharded(p)])
    replicas.align()
    stack.callback(replicas.close)
    wrap(stack, strategy, "block_backward_sync", lambda original: replicas.pause())


def _check_groups(optimizers: Iterable[Any]) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        kinds = {is_sharded(parameter) for parameter in group["params"]}
        chosen = next((key for key in ("fused", "foreach") if group.get(key)), None)
        if len(kinds) == 2 and chosen is not None:
            raise MisconfigurationException(
                f"`{chosen}=True` cannot step on sharded parameters and whole ones in one group, and adapters are "
                "whole on every rank. Leave it out, or keep what `also_train` names out of `fully_shard` by its "
                "`ignored_params`."
            )


def optimizer_state(original: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state as torch writes it, whole and on the CPU; every rank must call it."""
    state = getattr(optimizer, "_optimizer", optimizer).state_dict()
    return {**state, "state": _mapped(state["state"], lambda value: whole(value).cpu())}


def load_optimizers(optimizers: list[Any], states: list[dict[str, Any]] | None) -> None:
    """The reverse of :func:`optimizer_state`.

    Raises:
        ValueError: if there are none, or more or fewer of them.
    """
    if states is None:
        raise ValueError(
            "The checkpoint was saved with weights only, without the state of the optimizers, so training cannot "
            "continue from it. Save it with `save_weights_only=False`."
        )
    if len(optimizers) != len(states):
        raise ValueError(
            f"The checkpoint holds the state of {len(states)} optimizers, but the module has {len(optimizers)}: resume "
            "with the `configure_optimizers` that it was written with."
        )
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        laid_out = {key: _laid_out(value, parameters[key]) for key, value in state["state"].items()}
        optimizer.load_state_dict({**state, "state": laid_out})


def _laid_out(state: Mapping[str, Any], parameter: Tensor) -> Any:
    return _mapped(state, lambda value: laid_out_as(parameter, value) if value.shape == parameter.shape else value)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, Tensor) else value
