"""One run of a Trainer over a module: what is wrapped for its length, and how the module is left after it."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from lightning_utilities.core.overrides import is_overridden
from torch import Tensor, distributed, nn

from lightning_lora import checkpoints, random_state
from lightning_lora.apply import check_same, drop_adapters, inject
from lightning_lora.bits import same_bits
from lightning_lora.compatibility import best_checkpoints
from lightning_lora.config import LoRAConfig
from lightning_lora.fingerprint import Fingerprint, fingerprint
from lightning_lora.freeze import freeze, is_frozen, thaw
from lightning_lora.layer import is_adapted, resting
from lightning_lora.lightnings import rank_zero_info, rank_zero_warn
from lightning_lora.liveness import Liveness
from lightning_lora.merge import merge_lora, unmerge_lora
from lightning_lora.names import clean
from lightning_lora.optimizers import restrict
from lightning_lora.originals import remember
from lightning_lora.rates import scale_rates
from lightning_lora.record import Record, all_records, config_of, is_merged, place_again
from lightning_lora.state import load_lora_state_dict, lora_parameters, lora_state_dict
from lightning_lora.summary import describe
from lightning_lora.targets import find_targets
from lightning_lora.wraps import wrap


class Run:
    """From ``setup`` to ``strategy.teardown``, which alone is also called after an exception or Ctrl-C.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        config: what to adapt.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
    """

    def __init__(self, trainer: Any, module: Any, config: LoRAConfig, stage: str) -> None:
        self.trainer, self.module, self.config, self.stage = trainer, module, config, stage
        self.strategy = trainer.strategy
        self.base: Fingerprint = {}
        self.random_states: list[random_state.State] | None = None
        self.loaded = self.ended = self.abandoned = False
        self.found_merged, self.found_bare = is_merged(module), config_of(module) is None
        self.found_frozen = is_frozen(module)
        self.snapshot: dict[str, Any] = {}
        self.records: dict[str, Record] = {}
        self.plain_files: set[str] = set()
        self.liveness: Liveness | None = None
        self.stack = ExitStack()

    def begin(self) -> None:
        """Adapt the module; a merged one runs as it is, unless a file is loaded."""
        check_same(self.module, self.config)
        wrap(self.stack, self.strategy, "teardown", self.end)
        wrap(self.stack, self.strategy, "save_checkpoint", self.save)
        wrap(self.stack, self.strategy, "load_checkpoint", self.load)
        self.stack.callback(self.module.register_load_state_dict_post_hook(checkpoints.AdapterOnly()).remove)
        if not self.found_merged or self.stage == "fit":
            self.adapt()

    def adapt(self) -> None:
        """Adapt what exists, and wrap what is called between here and the end."""
        self.unmerge()
        wrap(self.stack, self.strategy, "lightning_module_state_dict", self.module_state)
        wrap(self.stack, self.strategy, "load_model_state_dict", self.load_module_state)
        wrap(self.stack, self.module, "configure_optimizers", self.configure_optimizers)
        # Some models are built in `setup`, which comes after every callback's, or in `configure_model` after that.
        # What exists is adapted now, so that callbacks which copy the module in their `setup` see the adapters.
        late = "configure_model" if overrides(self.module, "configure_model") else "setup"
        if late == "setup":
            inject(self.module, find_targets(self.module, self.config), self.config)
        wrap(self.stack, self.module, late, self.complete)

    def unmerge(self) -> None:
        """Take a merge out, and keep what is needed to put it back."""
        if is_merged(self.module):
            self.snapshot = deepcopy(lora_state_dict(self.module))
            unmerge_lora(self.module)

    def complete(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The user's hook, after which the model is whole: adapt what it made, and say what is adapted."""
        result = original(*args, **kwargs)
        self.inject()
        if self.stage == "fit":
            self.base = fingerprint(self.module)
            rank_zero_info(describe(self.module))
        return result

    def inject(self) -> None:
        """Adapt all that the configuration means, or raise."""
        targets = find_targets(self.module, self.config)
        targets.check()
        inject(self.module, targets, self.config)
        remember(self.module)
        self.records = all_records(self.module)

    def configure_optimizers(self, original: Any) -> Any:
        """The user's optimizers, made as without LoRA, then restricted."""
        from lightning.pytorch.core.optimizer import _configure_optimizers

        self.restore_random_state()
        place_again(self.module, self.records)  # converting to SyncBatchNorm puts new modules in place of old ones
        thaw(self.module)
        try:
            with resting(self.module):  # parameters that are adapted where they are read are themselves here
                result = original()
        finally:
            freeze(self.module, self.config)
        if result is None:
            rank_zero_warn("`configure_optimizers` returned None, so nothing trains the adapters.")
            return result
        optimizers, schedulers, _ = _configure_optimizers(result)
        restrict(optimizers, self.module)
        if self.config.lr_scale != 1:
            scale_rates(optimizers, schedulers, self.config.lr_scale, self.module)
        return result

    def watch(self, optimizers: list[Any]) -> None:
        """Check from here on that the adapters are alive."""
        if self.liveness is not None:  # a tuner has run before
            self.liveness.close()
        self.liveness = Liveness(self.module)
        self.stack.callback(self.liveness.close)
        self.liveness.check_held(optimizers)

    def module_state(self, original: Any) -> dict[str, Any]:
        """The adapters, whatever a ``state_dict`` of the user's own would leave out."""
        return lora_state_dict(self.module)

    def load_module_state(self, original: Any, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """The reverse: all of it, or an error before anything is loaded."""
        load_lora_state_dict(self.module, {clean(key): value for key, value in checkpoint["state_dict"].items()})
        self.loaded = True

    def save(self, original: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> Any:
        """Every save ends here, weights-only ones and those of other callbacks too."""
        if is_merged(self.module):  # while it is evaluated as it is
            self.plain_files.add(str(filepath))
            return original(checkpoint, filepath, storage_options=storage_options)
        self.base = self.base or fingerprint(self.module)
        checkpoints.check_complete(checkpoint, self.module)
        checkpoint = checkpoints.without_base(checkpoint, self.module)
        checkpoint[checkpoints.KEY] = checkpoints.facts(self.config, self.base)
        if "callbacks" in checkpoint:  # so that Lightning warns where a run without the callback loads the file
            checkpoint["callbacks"] = {
                **checkpoint["callbacks"],
                f"LoRACallback[{self.config.name}]": {"r": self.config.r},
            }
        if "optimizer_states" in checkpoint:
            checkpoint[checkpoints.KEY]["random_states"] = self._random_states()
        if type(self.strategy.checkpoint_io).__name__ == "TorchCheckpointIO" and "://" not in str(filepath):
            return checkpoints.write_beside(original, checkpoint, filepath, storage_options)
        return original(checkpoint, filepath, storage_options=storage_options)  # the user's own may write anywhere

    def _random_states(self) -> list[random_state.State]:
        own = random_state.random_state(self.strategy.root_device)
        # After an exception the other ranks may never come to this point.
        return [own] if self.interrupted else random_state.of_all_ranks(own)

    def load(self, original: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Check the file before Lightning loads it."""
        if str(checkpoint_path) in self.plain_files:
            return dict(original(checkpoint_path, weights_only=weights_only))
        checkpoint = checkpoints.read(original, checkpoint_path, weights_only)
        if not is_adapted(self.module):  # merged, or built anew in `setup`
            self.adapt()
            self.inject()
        self.base = self.base or fingerprint(self.module)
        checkpoints.check(checkpoint, checkpoint_path, self.module, self.config, self.base)
        self.random_states = checkpoint[checkpoints.KEY].get("random_states")
        return checkpoints.fit_to(checkpoint, self.module)

    def keep_averages_exact(self) -> None:
        """Let an averaging callback leave the base as it is: ``0.9 * w + 0.1 * w`` is not ``w`` in floating point."""
        for callback in self.trainer.callbacks:
            averaged = getattr(callback, "_average_model", None)
            if getattr(averaged, "avg_fn", None) is not None:
                wrap(self.stack, averaged, "avg_fn", equal_stays)

    def restore_random_state(self) -> None:
        """Continue the random stream of the run that is resumed: after the load, before the first batch is drawn.

        A module that asks for ``estimated_stepping_batches`` in ``configure_optimizers`` has drawn it by the time that
        fitting starts, so this is called before both.
        """
        states, ranks = self.random_states, distributed.get_world_size() if distributed.is_initialized() else 1
        if states is None or self.trainer.train_dataloader is not None:
            return
        if len(states) == ranks:
            random_state.set_random_state(states[self.trainer.global_rank], self.strategy.root_device)
        else:
            self.random_states = None
            rank_zero_warn(
                f"The checkpoint holds the random state of {len(states)} process(es) and this run has {ranks}: it is "
                "not restored, so dropout and shuffling will differ from the uninterrupted run."
            )

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
                thaw(self.module)
            if self.stage != "fit" or self.abandoned or (self.interrupted and self.untrained()):
                self.leave_as_found()

    def untrained(self) -> bool:
        """Whether the run changed nothing of what it trains: manual optimization may step uncounted."""
        if self.found_merged:
            now = {name: parameter.detach() for name, parameter in lora_parameters(self.module)}
            return all(same_bits(self.snapshot[name], value) for name, value in now.items() if name in self.snapshot)
        return not any(bool(parameter.any()) for name, parameter in lora_parameters(self.module) if name.endswith("B"))

    def leave_as_found(self) -> None:
        """After a run that trained nothing: merged if it was merged, bare if it was bare and nothing was loaded."""
        if self.found_merged and is_adapted(self.module) and self.snapshot:
            load_lora_state_dict(self.module, self.snapshot)
            merge_lora(self.module)
        elif self.found_bare and (self.stage == "fit" or self.abandoned or not self.loaded):
            drop_adapters(self.module)


def equal_stays(average: Any, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    """The average of two equal numbers is that number."""
    return torch.where(averaged == current, averaged, average(averaged, current, count))


def overrides(module: nn.Module, method: str) -> bool:
    """Whether the user's module has a ``method`` of its own."""
    parent = next(cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule")
    return bool(is_overridden(method, module, parent))


def load_best(trainer: Any, module: Any) -> bool:
    """Load the adapters of the best checkpoint, with all that its file holds; ``False`` where there is none."""
    path = getattr(best_checkpoints(trainer), "best_model_path", "")
    if not path:
        return False
    checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(
        path, map_location=torch.device("cpu"), weights_only=False
    )
    module.on_load_checkpoint(checkpoint)  # the reverse of what its `on_save_checkpoint` did
    load_lora_state_dict(module, checkpoints.adapter_of(checkpoint, module))
    return True
