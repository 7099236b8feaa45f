"""FSDP of both generations: the frozen base is sharded, what trains stays whole on every rank.

Hundreds of tiny sharded parameters would cost more than the base. So the gradients of what trains are averaged by
:mod:`lightning_lora.distributed.averaging`, and a save or a load moves nothing of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_lora import names
from lightning_lora.distributed.averaging import GradientAveraging
from lightning_lora.distributed.sharded import (
    clip_by_norm,
    clip_by_value,
    fsdp1_units,
    full_tensor,
    is_sharded,
    is_split,
    shard_like,
)
from lightning_lora.layers.base import adapted_layers, parameter_of
from lightning_lora.model.freeze import adapter_parameters, in_files, trained_parameters
from lightning_lora.model.sum_groups import compute_on_activations
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.patching import patch_attribute, patch_method
from lightning_lora.trainer.strategies.base import StrategyAdapter, states_in
from lightning_lora.trainer.strategies.quantized import check_flat_codes, check_sharded_codes, check_sharded_tensors


class Sharded(StrategyAdapter):
    """FSDP of either generation.

    Checkpoints are one file: torch's loader rejects missing keys, so a directory of shards cannot hold a part of a
    module. Statistics of BatchNorm are each rank's own; the file holds those of the first rank.
    """

    loads_late = True
    keeps_weights_whole = False

    def __init__(self, strategy: Any, module: nn.Module) -> None:
        super().__init__(strategy, module)
        self.stepped_singly: list[dict[str, Any]] = []

    def at_setup(self, stack: ExitStack) -> None:
        """Write and load optimizer states by ourselves, and clip gradients.

        Lightning refuses to clip by norm under FSDP1, and torch a mixture of sharded and whole parameters.
        """
        plugin = self.strategy.precision_plugin
        patch_method(stack, self.strategy, "optimizer_state", self.optimizer_state)
        patch_method(stack, plugin, "clip_grad_by_norm", _clip(plugin, clip_by_norm))
        patch_method(stack, plugin, "clip_grad_by_value", _clip(plugin, clip_by_value))

    def after_injection(self) -> None:
        """Compute on the side of the activations: the weights of several layers are never whole at the same time."""
        compute_on_activations(self.module)

    def after_optimizers(self, stack: ExitStack, optimizers: list[Any], schedulers: list[Any]) -> None:
        """From here on, average the gradients of what is whole on every rank."""
        _check_groups(optimizers)
        self.step_singly(optimizers)
        if distributed.get_world_size() == 1:
            return
        averaging = GradientAveraging([p for _, p in trained_parameters(self.module) if not is_sharded(p)])
        averaging.align()
        stack.callback(averaging.close)
        patch_method(stack, self.strategy, "block_backward_sync", lambda original: averaging.pause())
        patch_method(stack, self.strategy, "pre_backward", _queueing(averaging))

    def needs_every_gradient(self) -> bool:
        """FSDP2 scatters the gradients of a unit's parameters together; those that are whole are averaged here."""
        return any(is_sharded(parameter) for parameter in adapter_parameters(self.module).values())

    def step_singly(self, optimizers: list[Any]) -> None:
        """Step parameter by parameter on a mixture: torch's default on CUDA, ``foreach``, fails on one."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.stepped_singly = [group for group in groups if "foreach" in group and _mixes(group)]
        for group in self.stepped_singly:
            group["foreach"] = False

    def optimizer_state(self, original: Any, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state in torch's own format, whole and on the CPU; every rank must call it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()
        for written, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            if any(group is other for other in self.stepped_singly):
                written["foreach"] = None
        gathered = _mapped(state["state"], lambda value: full_tensor(value).cpu() if is_sharded(value) else value)
        return {**state, "state": gathered}

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states; each rank takes its own part of a sharded parameter's state.

        Raises:
            ValueError: if the file has no states, or more or fewer of them.
        """
        optimizers = self.strategy.optimizers
        for optimizer, state in zip(optimizers, states_in(checkpoint, len(optimizers)), strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            laid_out = {key: _laid_out(value, parameters[key]) for key, value in state["state"].items()}
            chosen = [{key: g[key] for key in ("foreach", "fused") if key in g} for g in optimizer.param_groups]
            optimizer.load_state_dict({**state, "state": laid_out})
            for group, own in zip(optimizer.param_groups, chosen, strict=True):
                group.update(own)  # how to step is a setting of this run, not of the file
        self.step_singly(optimizers)


class FSDP1(Sharded):
    """``FSDPStrategy``: the parameters of a unit become pieces of one flat parameter, but for ``ignored_states``."""

    def at_setup(self, stack: ExitStack) -> None:
        """Write one file, not a directory."""
        patch_attribute(stack, self.strategy, "_state_dict_type", "full")
        super().at_setup(stack)

    def before_injection(self, bare: bool) -> None:
        """Raise if the module was wrapped before it had adapters, or if its outermost unit is gone.

        Raises:
            MisconfigurationException: saying what to do instead.
        """
        name, inside = (
            type(self.module).__name__,
            {id(p) for unit in fsdp1_units(self.module) for p in unit.parameters()},
        )
        adapters = adapter_parameters(self.module)
        pieces = {id(parameter) for parameter in self.module.parameters() if is_split(parameter)}
        if pieces - inside:
            raise MisconfigurationException(
                f"{name} was set up for FSDPStrategy by an earlier run, and Lightning cannot do so twice where "
                "parameters are outside of all wrapped blocks. Make a fresh module and give it `ckpt_path`."
            )
        if pieces & adapters.keys() or (bare and pieces):
            raise MisconfigurationException(
                f"{name} is wrapped in FullyShardedDataParallel already, by an earlier run or in its "
                "`configure_model`, and adapters can only come before that. Make a fresh module, and leave the "
                "wrapping to the strategy: FSDPStrategy(auto_wrap_policy={YourBlock})."
            )

    def before_wrap(self, stack: ExitStack) -> None:
        """Add trained parameters to ``ignored_states``; FSDP then neither shards, moves, materializes nor casts them.

        Raises:
            MisconfigurationException: if a parameter of the base trains that FSDP should have cast, or all train, or a
                quantized weight cannot be sharded.
        """
        if fsdp1_units(self.module):  # by an earlier run
            return
        super().before_wrap(stack)
        check_flat_codes(self.strategy, self.module)
        self._check_casts()
        if all(parameter.requires_grad for parameter in self.module.parameters()):
            raise MisconfigurationException(
                "FSDPStrategy shards what is frozen, and here everything trains, so that nothing would be sharded. Use "
                "strategy='ddp', or ModelParallelStrategy, which shards what trains too."
            )
        device, kwargs = self.strategy.root_device, self.strategy.kwargs
        _materialize(self.module, device)
        ours = [parameter for _, parameter in in_files(self.module)]
        for parameter in ours:
            parameter.data = parameter.data.to(device)
        theirs = [*(kwargs.get("ignored_states") or ()), *(kwargs.get("ignored_modules") or ())]
        ignored = [p for one in theirs for p in (one.parameters() if isinstance(one, nn.Module) else [one])]
        rest = {key: value for key, value in kwargs.items() if key != "ignored_modules"}
        patch_attribute(stack, self.strategy, "kwargs", {**rest, "ignored_states": [*ignored, *ours]})

    def _check_casts(self) -> None:
        """Refuse ``mixed_precision`` of the strategy if more than adapters trains: FSDP would not cast it."""
        own, adapters = self.strategy.mixed_precision, adapter_parameters(self.module)
        in_full = [name for name, p in in_files(self.module) if id(p) not in adapters]
        if own is not None and own.param_dtype not in (None, torch.float32) and in_full:
            raise MisconfigurationException(
                f"`{in_full[0]}` trains in addition to the adapters and stays out of FSDP's units, so "
                "`mixed_precision` of the strategy would not cast it. Use precision='bf16-mixed' instead, or leave out "
                "`also_train` and `bias`."
            )


class FSDP2(Sharded):
    """``ModelParallelStrategy``: the user has sharded the module in ``configure_model``."""

    def at_setup(self, stack: ExitStack) -> None:
        """Write one file, not a directory; raise for weights that the user's ``fully_shard`` could not split.

        Raises:
            MisconfigurationException: naming the first one.
        """
        check_sharded_tensors(self.strategy, self.module)
        patch_attribute(stack, self.strategy, "_save_distributed_checkpoint", False)
        super().at_setup(stack)

    def before_wrap(self, stack: ExitStack) -> None:
        """Raise for tensor parallelism: A and B would have to be split as the weight is; and for 8-bit layers.

        Raises:
            MisconfigurationException: naming the first layer that is split by it, or stored so.
        """
        super().before_wrap(stack)
        check_sharded_codes(self.strategy, self.module)
        for name, layer in adapted_layers(self.module):
            for key in layer.lora.by_weight():
                mesh = getattr(parameter_of(layer, key), "device_mesh", None)
                if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()):
                    raise MisconfigurationException(
                        f"`{names.join(name, key)}` is split by tensor parallelism, which adapters do not take part "
                        "in. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), or leave the "
                        "layer out with `exclude`."
                    )

    def after_merge(self) -> None:
        """Drop the optimizers: torch would look for their parameters in the module at the next save."""
        self.strategy.optimizers = []


def _queueing(averaging: GradientAveraging) -> Callable[..., Any]:
    """Average in every backward of Lightning, also on ranks where nothing that is whole has a gradient."""

    def watch(original: Any, loss: Tensor) -> Any:
        if loss.requires_grad:
            loss.register_hook(averaging.queue)  # type: ignore[no-untyped-call]
        return original(loss)

    return watch


def _clip(plugin: Any, clip_by: Callable[[Any, float], None]) -> Callable[..., None]:
    def clip(original: Any, optimizer: Any, clip_val: float) -> None:
        if clip_val > 0:
            clip_by(plugin.main_params(optimizer), clip_val)

    return clip


def _materialize(module: nn.Module, device: Any) -> None:
    trained = {id(parameter) for _, parameter in in_files(module)}
    for part in module.modules():
        if any(parameter.is_meta and id(parameter) in trained for parameter in part.parameters(recurse=False)):
            part.to_empty(device=device, recurse=False)
            part.reset_parameters()  # type: ignore[operator]


def _check_groups(optimizers: list[Any]) -> None:
    """Refuse ``fused`` and ``foreach`` for a mixture: torch steps on sharded or on whole parameters, not on both."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        chosen = next((key for key in ("fused", "foreach") if group.get(key)), None)
        if chosen is not None and _mixes(group):
            raise MisconfigurationException(
                f"`{chosen}=True` cannot step on sharded parameters and whole ones in one group, and adapters are "
                "whole on every rank. Leave it out, or keep what `also_train` names out of `fully_shard` by its "
                "`ignored_params`."
            )


def _mixes(group: Mapping[str, Any]) -> bool:
    """Whether a group of an optimizer has sharded parameters and whole ones."""
    return len({is_sharded(parameter) for parameter in group["params"]}) == 2


def _laid_out(state: Mapping[str, Any], parameter: Tensor) -> Any:
    return _mapped(state, lambda value: shard_like(parameter, value) if value.shape == parameter.shape else value)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, Tensor) else value
