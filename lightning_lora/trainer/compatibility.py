"""Which parts of a Trainer work with the callback. The others are refused before the first step."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.overrides import is_overridden
from torch import nn

from lightning_lora.config import LoRAConfig, MethodConfig, RunConfig
from lightning_lora.foreign import (
    AVERAGING_CALLBACKS,
    AVERAGING_IN_SETUP,
    LIGHTNING_MODULE,
    MIXED_PRECISION,
    SHARDING_STRATEGIES,
    SPAWNING_LAUNCHERS,
    SPLITTING_STRATEGIES,
    UNFREEZING_CALLBACK,
    UNTRIED_PRECISION,
    UNTRIED_STRATEGIES,
    is_a,
)
from lightning_lora.layers.quantized.formats import holds_float_codes
from lightning_lora.trainer.imports import MisconfigurationException
from lightning_lora.trainer.strategies.selection import strategy_adapter_for

MIXED = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def check_compatibility(trainer: Any, callback: Any, stage: str) -> None:
    """Raise for a part of the Trainer that does not work with the callback.

    Raises:
        MisconfigurationException: naming the part of the Trainer and what to do about it.
    """
    _check_strategy(trainer)
    _check_whole_weights(trainer, callback)
    run_config: RunConfig = callback.run_config
    _check_other_adapters(trainer, callback, callback.config)
    _check_callbacks(trainer, callback)
    if run_config.base_dtype is not None:
        _check_base_dtype(trainer, run_config.base_dtype)
    if run_config.compute == "weights":
        _check_compute(trainer)
    if stage == "fit":
        _check_checkpoints(trainer, run_config)


def _check_strategy(trainer: Any) -> None:
    """Refuse strategies and plug-ins in which an adapter could not act.

    ``XLAFSDPStrategy`` and ``TransformerEnginePrecision`` were never tried. ``use_orig_params=False`` makes one flat
    parameter of a unit, in which an adapter cannot find its weight.
    """
    if is_a(trainer.strategy, *UNTRIED_STRATEGIES):
        raise MisconfigurationException(
            f"LoRACallback does not support {type(trainer.strategy).__name__} yet: use strategy='auto' or 'ddp'."
        )
    if getattr(getattr(trainer.strategy, "sharding_strategy", None), "name", "") == "NO_SHARD":
        raise MisconfigurationException(
            "`sharding_strategy='NO_SHARD'` keeps every weight whole on every rank, as strategy='ddp' does: use that."
        )
    if getattr(trainer.strategy, "kwargs", {}).get("use_orig_params") is False:
        raise MisconfigurationException(
            "`use_orig_params=False` makes one parameter of all those in a unit, in which no adapter can find its "
            "weight. Leave it out: Lightning's FSDPStrategy sets it to True."
        )
    if is_a(trainer.precision_plugin, UNTRIED_PRECISION):
        raise MisconfigurationException(
            "`TransformerEnginePrecision` replaces every linear layer, its adapters included, by layers of its own, "
            "and none of those was tried. Use precision='bf16-mixed' or 'bf16-true'."
        )


def _check_whole_weights(trainer: Any, callback: Any) -> None:
    """Refuse strategies that put pieces of a buffer in the place of weights which the method must find by name."""
    if callback.method.reads_weights_by_name and is_a(trainer.strategy, *SPLITTING_STRATEGIES):
        raise MisconfigurationException(
            f"{type(callback).__name__} changes weights where code reads them by name, and "
            f"{type(trainer.strategy).__name__} puts pieces of a flat buffer there, which would be read unchanged. Use "
            "strategy='ddp', or ModelParallelStrategy with `fully_shard` in `configure_model`."
        )


def _check_other_adapters(trainer: Any, callback: Any, config: MethodConfig) -> None:
    for other in trainer.callbacks:
        if other is callback or not is_a(other, "MethodCallback"):
            continue
        if type(other.config) is not type(config) or not isinstance(config, LoRAConfig):
            raise MisconfigurationException(
                f"The Trainer has {type(callback).__name__} and {type(other).__name__}, and a model takes one "
                "method. Keep one; what else is to train in full goes into its `also_train`."
            )
        raise MisconfigurationException(
            "The Trainer has two LoRACallbacks, and each would take the optimizers, the files and the merge for "
            "itself. Keep one: `adapters` gives several adapters their own arguments, adapters={'fr': {}, 'de': "
            "{'r': 4}}, and for one adapter a list in `targets` and `rank_pattern` say all that two callbacks could."
        )


def _check_callbacks(trainer: Any, callback: Any) -> None:
    own, before = type(callback).__name__, trainer.callbacks[: trainer.callbacks.index(callback)]
    for other in before:
        if is_a(other, *AVERAGING_CALLBACKS):
            name = type(other).__name__
            raise MisconfigurationException(
                f"{name} copies the model in its `setup`, so {own} must come before it: "
                f"callbacks=[{own}(...), {name}(...)]."
            )
    for other in trainer.callbacks:
        _check_averaging(trainer, other)
        if is_a(other, UNFREEZING_CALLBACK):
            raise MisconfigurationException(
                f"{type(other).__name__} freezes and unfreezes the modules that {own} keeps frozen. Use one "
                "of the two; to train modules in full, name them in `also_train`."
            )


def _check_averaging(trainer: Any, other: Any) -> None:
    """Refuse an average that copies a module which is sharded, or not built yet."""
    name, strategy = type(other).__name__, type(trainer.strategy).__name__
    if is_a(other, *AVERAGING_CALLBACKS) and is_a(trainer.strategy, *SHARDING_STRATEGIES):
        raise MisconfigurationException(
            f"{name} copies the whole module, which {strategy} shards. Leave it out, or use strategy='ddp'."
        )
    if is_a(other, *AVERAGING_CALLBACKS) and any(map(holds_float_codes, trainer.lightning_module.parameters())):
        raise MisconfigurationException(
            f"{name} averages every parameter, and the model has quantized weights, whose codes have no average. Leave "
            f"{name} out, or load the model without quantization."
        )
    if is_a(other, AVERAGING_IN_SETUP) and overrides(trainer.lightning_module, "configure_model"):
        raise MisconfigurationException(
            f"{name} copies the module in its `setup`, before `configure_model` has made what is adapted. Make the "
            "model in `__init__`, or use WeightAveraging."
        )


def _check_base_dtype(trainer: Any, dtype: str) -> None:
    """Refuse ``base_dtype`` where something else casts or copies the base, or autocast casts to another dtype."""
    if is_a(trainer.strategy, *SHARDING_STRATEGIES):
        raise MisconfigurationException(
            f"`base_dtype={dtype!r}` does not work with {type(trainer.strategy).__name__}, which casts its own parts "
            "of the weights. Leave it out, or use strategy='ddp'."
        )
    wanted, plugin = MIXED[dtype], trainer.precision_plugin
    if not is_a(plugin, MIXED_PRECISION) or plugin.precision != wanted:
        raise MisconfigurationException(
            f"`base_dtype={dtype!r}` keeps weights in the dtype to which precision={wanted!r} casts them at every use, "
            f"but the Trainer has precision={plugin.precision!r}. Change one of the two, or leave out `base_dtype`."
        )
    for other in trainer.callbacks:
        if is_a(other, *AVERAGING_CALLBACKS):
            raise MisconfigurationException(
                f"`base_dtype={dtype!r}` does not work with {type(other).__name__}, which averages the base in its own "
                "dtype. Leave one of the two out."
            )


def _check_compute(trainer: Any) -> None:
    """Refuse ``compute="weights"`` where the weights of several layers are never whole at the same time."""
    if not strategy_adapter_for(trainer.strategy, trainer.lightning_module).keeps_weights_whole:
        raise MisconfigurationException(
            f"`compute='weights'` sums whole weights, and {type(trainer.strategy).__name__} keeps them in pieces. "
            "Leave `compute` out: the layers then compute on the side of the activations."
        )


def _check_checkpoints(trainer: Any, config: RunConfig) -> None:
    """Refuse a run at whose end the adapters would be lost, or not be the ones that were asked for."""
    if config.merge == "best" and not trainer.fast_dev_run and best_checkpoints(trainer) is None:
        raise MisconfigurationException(
            "`merge='best'` needs a checkpoint to take the best adapters from, but the Trainer has no ModelCheckpoint "
            "with a `monitor`. Add ModelCheckpoint(monitor=...), or use merge='last'."
        )
    if config.save == "merged" and is_a(trainer.strategy, *SHARDING_STRATEGIES):
        raise MisconfigurationException(
            f"`save='merged'` needs the whole model in every save, which {type(trainer.strategy).__name__} shards, and "
            "no save gathers the base. Use save='adapter'; the merged weights are written at the end of fit."
        )
    if is_spawned(trainer) and not trainer.checkpoint_callbacks:
        raise MisconfigurationException(
            "Processes started by spawn or fork do not give the adapters back to this one, and without a "
            "ModelCheckpoint they would be lost. Add one, or use strategy='ddp'."
        )
    if is_spawned(trainer) and config.export is not None:
        raise MisconfigurationException(
            f"`export={config.export!r}` is written at the end of fit, when processes started by spawn or fork are "
            "gone with the adapters. Use strategy='ddp', or save_adapter(load_from_checkpoint(...), ...) afterwards."
        )
    if is_spawned(trainer) and config.merged is not None:
        raise MisconfigurationException(
            f"`merged={config.merged!r}` is written at the end of fit, when processes started by spawn or fork are "
            "gone with the adapters. Use strategy='ddp', or torch.save(merged_state_dict(load_from_checkpoint(...)), "
            "...) afterwards."
        )


def best_checkpoints(trainer: Any) -> Any | None:
    """The first checkpoint callback that monitors a metric: without one its best is only its last."""
    return next((callback for callback in trainer.checkpoint_callbacks if getattr(callback, "monitor", None)), None)


def gpu_of(trainer: Any) -> torch.device | None:
    """The GPU of this rank, where a merge takes a fraction of its time on a CPU; ``None`` without one."""
    device: torch.device = trainer.strategy.root_device
    return device if device.type == "cuda" else None


def is_spawned(trainer: Any) -> bool:
    """Whether this is a process of a launcher that starts workers from the running one, as ``ddp_spawn`` does."""
    return is_a(trainer.strategy.launcher, *SPAWNING_LAUNCHERS)


def overrides(module: nn.Module, method: str) -> bool:
    """Whether the user's module has a ``method`` of its own."""
    parent = next(cls for cls in type(module).__mro__ if cls.__name__ == LIGHTNING_MODULE)
    return bool(is_overridden(method, module, parent))
