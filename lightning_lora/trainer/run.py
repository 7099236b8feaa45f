"""One run of a Trainer over a module: what is wrapped for its length, and how the module is left after it."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import BASE_DTYPES, LoRAConfig, RunConfig
from lightning_lora.distributed.sharded import local
from lightning_lora.layers.base import adapters_disabled, is_adapted
from lightning_lora.model.apply import check_same, drop_adapters, inject
from lightning_lora.model.base_dtype import cast_by_autocast, lower
from lightning_lora.model.freeze import freeze, is_frozen, unfreeze
from lightning_lora.model.initial_values import remember
from lightning_lora.model.merge import merge_lora, unmerge_lora
from lightning_lora.model.record import Record, all_records, config_of, is_merged, place_again
from lightning_lora.model.state import load_lora_state_dict, lora_parameters, lora_state_dict
from lightning_lora.model.summary import describe
from lightning_lora.ops.exact_sum import same_bits
from lightning_lora.targets.resolve import find_targets
from lightning_lora.trainer.checkpoint_io import Files
from lightning_lora.trainer.compatibility import SHARDING, is_a, overrides
from lightning_lora.trainer.imports import rank_zero_info, rank_zero_warn
from lightning_lora.trainer.init_and_export import check_export, start_from
from lightning_lora.trainer.liveness import Liveness
from lightning_lora.trainer.lr_scale import scale_rates
from lightning_lora.trainer.optimizers import restrict
from lightning_lora.trainer.patching import patch_method
from lightning_lora.trainer.strategies.base import StrategyAdapter
from lightning_lora.trainer.strategies.deepspeed import DeepSpeed
from lightning_lora.trainer.strategies.fsdp import FSDP1, FSDP2

STRATEGY_ADAPTERS: dict[str, type[StrategyAdapter]] = dict(zip(SHARDING, (FSDP1, FSDP2, DeepSpeed), strict=True))


class Run:
    """From ``setup`` to ``strategy.teardown``, which alone is also called after an exception or Ctrl-C.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        config: what to adapt.
        run_config: what to do with it.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
    """

    def __init__(self, trainer: Any, module: Any, config: LoRAConfig, run_config: RunConfig, stage: str) -> None:
        self.trainer, self.module, self.stage = trainer, module, stage
        self.config, self.run_config = config, run_config
        self.strategy = trainer.strategy
        strategy_adapter = next(
            (STRATEGY_ADAPTERS[name] for name in STRATEGY_ADAPTERS if is_a(trainer.strategy, name)), StrategyAdapter
        )
        self.strategy_adapter = strategy_adapter(trainer.strategy, module)
        self.files = Files(trainer, module, config, run_config, self.strategy_adapter, self.adapt_merged)
        self.ended = self.abandoned = False
        self.found_merged, self.found_bare = is_merged(module), config_of(module) is None
        self.found_frozen = is_frozen(module)
        self.snapshot: dict[str, Any] = {}
        self.records: dict[str, Record] = {}
        self.liveness: Liveness | None = None
        self.stack = ExitStack()

    def begin(self) -> None:
        """Adapt the module; a merged one runs as it is, unless a file is loaded."""
        check_same(self.module, self.config)
        patch_method(self.stack, self.strategy, "teardown", self.end)
        self.files.open(self.stack)
        if not self.found_merged or self.stage == "fit":
            self.adapt()

    def convert(self) -> None:
        """Let a plug-in that puts quantized layers in place do so before those are adapted: it drops adapters."""
        plugin = self.trainer.precision_plugin
        made = any(isinstance(module, nn.Linear) for module in self.module.modules())
        if made and is_a(plugin, "BitsandbytesPrecision") and config_of(self.module) is None:
            plugin.convert_module(self.module)

    def adapt(self) -> None:
        """Adapt what exists, and wrap what is called between here and the end."""
        self.strategy_adapter.before_injection(self.found_bare)
        self.unmerge()
        self.files.take_module(self.stack)
        patch_method(self.stack, self.module, "configure_optimizers", self.configure_optimizers)
        # Some models are built in `setup`, which comes after every callback's, or in `configure_model` after that.
        # What exists is adapted now, so that callbacks which copy the module in their `setup` see the adapters.
        late = "configure_model" if overrides(self.module, "configure_model") else "setup"
        if late == "setup":
            self.convert()
            inject(self.module, find_targets(self.module, self.config), self.config)
        patch_method(self.stack, self.module, late, self.complete)

    def unmerge(self) -> None:
        """Take a merge out, and keep what is needed to put it back."""
        if is_merged(self.module):
            self.snapshot = deepcopy(lora_state_dict(self.module))
            unmerge_lora(self.module)

    def complete(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The user's hook, after which the model is whole: adapt what it made, and say what is adapted."""
        result = original(*args, **kwargs)
        self.inject()
        if self.stage == "fit" or self.strategy_adapter.loads_late:
            self.files.base_fingerprint()  # while it is as the user built it
        self.strategy_adapter.before_wrap(self.stack)
        self.exchange()
        self.lower_base()
        if self.stage == "fit":
            rank_zero_info(describe(self.module))
        return result

    def lower_base(self) -> None:
        """Keep the frozen weights in the dtype that the user asks for, until the end of the run."""
        if self.run_config.base_dtype is None:
            return
        found = list(cast_by_autocast(self.module))
        if not found:
            rank_zero_warn(
                f"`base_dtype={self.run_config.base_dtype!r}` changes nothing: no frozen fp32 weight belongs to a "
                "linear layer or a convolution of torch's own."
            )
        self.stack.callback(lower(found, BASE_DTYPES[self.run_config.base_dtype]))

    def exchange(self) -> None:
        """Give fresh adapters the values that the user names, and see that they can be written where he says."""
        path = self.run_config.init_from
        if self.run_config.export is not None and self.stage == "fit":
            check_export(self.module, self.run_config.export)
        if path is not None and not self.found_bare and self.stage == "fit":
            rank_zero_warn(f"`init_from={path!r}` was not read: the module has adapters, and goes on with those.")
        elif path is not None and self.found_bare:
            start_from(self.module, path, self.config, self.files.base_fingerprint())
            self.files.loaded = True
            self.snapshot = deepcopy(lora_state_dict(self.module))  # untrained is what still has these

    def adapt_merged(self) -> None:
        """Adapt a module that ran merged until a file is to be loaded, or was built anew in ``setup``."""
        self.adapt()
        self.inject()

    def inject(self) -> None:
        """Adapt all that the configuration means, or raise."""
        self.strategy_adapter.before_injection(self.found_bare)
        self.convert()
        targets = find_targets(self.module, self.config)
        targets.check()
        with self.strategy_adapter.during_injection():
            inject(self.module, targets, self.config)
        remember(self.module)
        self.records = all_records(self.module)

    def configure_optimizers(self, original: Any) -> Any:
        """The user's optimizers, made as without LoRA, then restricted."""
        from lightning.pytorch.core.optimizer import _configure_optimizers

        self.files.restore_random_state()
        place_again(self.module, self.records)  # converting to SyncBatchNorm puts new modules in place of old ones
        unfreeze(self.module)
        try:
            with adapters_disabled(self.module):  # parameters that are adapted where they are read are themselves here
                result = original()
        finally:
            freeze(self.module, self.config)
        if result is None:
            rank_zero_warn("`configure_optimizers` returned None, so nothing trains the adapters.")
            return result
        optimizers, schedulers, _ = _configure_optimizers(result)
        restrict(optimizers, self.module)
        self.strategy_adapter.after_optimizers(self.stack, optimizers, schedulers)
        if self.run_config.lr_scale != 1:
            scale_rates(optimizers, schedulers, self.run_config.lr_scale, self.module)
        return result

    def watch(self, optimizers: list[Any]) -> None:
        """Check from here on that the adapters are alive."""
        if not self.strategy_adapter.watches_gradients:
            return
        if self.liveness is not None:  # a tuner has run before
            self.liveness.close()
        self.liveness = Liveness(self.module)
        self.stack.callback(self.liveness.close)
        self.liveness.check_held(optimizers)

    def keep_averages_exact(self) -> None:
        """Let an averaging callback leave the base as it is: ``0.9 * w + 0.1 * w`` is not ``w`` in floating point."""
        for callback in self.trainer.callbacks:
            averaged = getattr(callback, "_average_model", None)
            if getattr(averaged, "avg_fn", None) is not None:
                patch_method(self.stack, averaged, "avg_fn", equal_stays)

    @property
    def interrupted(self) -> bool:
        """Whether an exception or Ctrl-C ended the run."""
        return bool(self.trainer.state.status == "interrupted")

    def end(self, original: Any) -> None:
        """The strategy's teardown, then nothing of this run is left."""
        try:
            original()
        finally:
            self.stack.close()
            self.ended = True
            place_again(self.module, self.records)
            if not self.found_frozen:
                unfreeze(self.module)
            if self.stage != "fit" or self.abandoned or (self.interrupted and self.untrained()):
                self.restore()

    def untrained(self) -> bool:
        """Whether the run changed nothing of what it trains: manual optimization may step uncounted."""
        if self.snapshot:
            now = {name: parameter.detach() for name, parameter in lora_parameters(self.module)}
            return all(same_bits(self.snapshot[name], value) for name, value in now.items() if name in self.snapshot)
        every_B = [local(p) for name, p in lora_parameters(self.module) if name.endswith("B") and not p.is_meta]
        return not any(bool(B.any()) for B in every_B)

    def restore(self) -> None:
        """After a run that trained nothing: merged if it was merged, bare if it was bare and nothing was loaded."""
        if self.found_merged and is_adapted(self.module) and self.snapshot:
            load_lora_state_dict(self.module, self.snapshot)
            merge_lora(self.module)
        elif self.found_bare and (self.stage == "fit" or self.abandoned or not self.files.loaded):
            drop_adapters(self.module)


def equal_stays(average: Any, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    """The average of two equal numbers is that number."""
    return torch.where(averaged == current, averaged, average(averaged, current, count))
